"""The dtypes that the ops take, and the one they compute in."""

import torch

SUPPORTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64 inputs, else float32.

    Raises:
        ValueError: `dtype` is not a floating dtype that the ops take.
    """
    if dtype not in SUPPORTED:
        names = ", ".join(str(name).removeprefix("torch.") for name in SUPPORTED)
        raise ValueError(f"dtype={dtype} is not supported; cast the inputs to one of {names}")
    return torch.float64 if dtype == torch.float64 else torch.float32
