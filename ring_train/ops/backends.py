"""Which backend of an op computes a given tensor."""

import importlib.util
import os

import torch
from torch import Tensor

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def resolve_backend(backend: str, x: Tensor, choices: tuple[str, ...] = ("torch", "triton")) -> str:
    """Return the backend that computes `x`: `auto` is Triton on a GPU, except in fp64, else torch.

    Args:
        backend: "auto" or one of `choices`.
        x: decides by its device and dtype.
        choices: what the op has.

    Raises:
        ValueError: the backend is unknown, or cannot run here.
    """
    if backend not in ("auto", *choices):
        raise ValueError(f"backend={backend!r} is unknown; choose one of {('auto', *choices)}")
    if backend == "auto":
        return "triton" if x.is_cuda and x.dtype in TRITON_DTYPES else "torch"
    if backend == "torch":
        return backend
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    # "meta" tensors have no values: a launch on them is compiled, not run.
    if not (x.is_cuda or x.is_meta or interpreted):
        raise ValueError(
            f"backend={backend!r} needs tensors on a GPU, these are on {x.device}; choose torch or "
            "auto (or set TRITON_INTERPRET=1 to try Triton's kernels on the CPU, very slowly)"
        )
    if x.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"backend={backend!r} does not compute {x.dtype}; cast to one of {TRITON_DTYPES}, or "
            "choose torch"
        )
    if backend == "fla" and importlib.util.find_spec("fla") is None:
        raise ValueError(
            "backend='fla' needs flash-linear-attention, which is not installed; install the "
            "extra ring-train[gpu], or choose triton"
        )
    return backend
