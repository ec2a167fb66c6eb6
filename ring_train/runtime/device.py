"""The device of this process, from torchrun's environment."""

import os

import torch


def local_device() -> torch.device:
    """Return the CUDA device of this process's LOCAL_RANK (0 without torchrun), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
