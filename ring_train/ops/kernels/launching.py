"""What launches of all kernels share: tuning, sizes of blocks, precision of dot products."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels of this process run in Triton's interpreter, on the CPU."""


def tuned(
    key: Sequence[str], *choices: tuple[int, int], first: tuple[int, int]
) -> Callable[[Any], Any]:
    """Return a decorator that times (num_warps, num_stages) once per `key` and keeps the best.

    Block sizes are the launch's, so a dot product adds in one order whatever is chosen; a `tl.sum`
    may not. Choices are cached on disk, in Triton's cache folder, so that they are those of the
    first run. The interpreter takes `first`.
    """
    pairs = [first] if INTERPRETED else [first, *(pair for pair in choices if pair != first)]
    configs = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in pairs]
    return triton.autotune(configs, key=list(key), cache_results=not INTERPRETED)


def padded(size: int) -> int:
    """Return the block that holds `size` elements: a power of two, at least 16 (a dot's least)."""
    return max(16, 1 << (size - 1).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """Return the `input_precision` of dot products for inputs of a dtype.

    fp32 is split into three products of tf32 numbers, which is nearly exact: without tensor cores a
    kernel of several products needs more registers than there are.
    """
    return "tf32x3" if dtype == torch.float32 else "tf32"


def num_processors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU; those of an H100 where there is none."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def _repair_interpreter() -> None:
    """Let the interpreter of Triton 3.6 count to a scalar that was computed.

    It keeps scalars as arrays of one element, which numpy 2.5 no longer converts to integers.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


if INTERPRETED:
    _repair_interpreter()
