"""Batch arithmetic: how rows, micro batches and tokens add up to a step."""

from dataclasses import dataclass
from math import isfinite
from typing import Protocol

from ring_train.config import ModelConfig
from ring_train.plan.context import context_problems
from ring_train.plan.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Sizes of one micro batch and one step."""

    seq_length: int
    """Tokens of one row."""
    micro_batch_size: int
    """Rows of one forward on one data-parallel rank."""
    global_batch_size: int
    """Rows of one step over all ranks."""
    num_micro_batches: int
    """Forwards of one step on one data-parallel rank."""
    tokens_per_micro_batch: int
    """Tokens of one micro batch; the rows lie end to end."""
    tokens_per_step: int


class RowSizes(Protocol):
    """What a phase says about its rows and batches."""

    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def seq_length(self) -> int: ...  # noqa: D102
    @property
    def micro_batch_size(self) -> int: ...  # noqa: D102
    @property
    def global_batch_size(self) -> int: ...  # noqa: D102
    @property
    def rotary_scaling_factor(self) -> float: ...  # noqa: D102


def make_batch(sizes: RowSizes, mesh: Mesh) -> BatchPlan:
    """Return the batch sizes; exact where `size_problems` finds nothing."""
    return BatchPlan(
        seq_length=sizes.seq_length,
        micro_batch_size=sizes.micro_batch_size,
        global_batch_size=sizes.global_batch_size,
        num_micro_batches=sizes.global_batch_size // (sizes.micro_batch_size * mesh.dp),
        tokens_per_micro_batch=sizes.micro_batch_size * sizes.seq_length,
        tokens_per_step=sizes.global_batch_size * sizes.seq_length,
    )


def size_problems(sizes: RowSizes, model: ModelConfig, mesh: Mesh) -> list[str]:
    """Return what is wrong with the row and batch sizes of a phase."""
    problems = [
        f"{sizes.path}.{name}={value} is not positive; choose a value above 0"
        for name in ("seq_length", "micro_batch_size", "global_batch_size")
        if (value := getattr(sizes, name)) < 1
    ]
    if problems:
        return problems
    rows = sizes.micro_batch_size * mesh.dp
    if sizes.global_batch_size % rows:
        problems.append(
            f"{sizes.path}.global_batch_size={sizes.global_batch_size} is not divisible by "
            f"{sizes.path}.micro_batch_size={sizes.micro_batch_size} * data-parallel size "
            f"{mesh.dp}; choose a multiple of {rows}"
        )
    tokens = sizes.micro_batch_size * sizes.seq_length
    key = (
        f"{sizes.path}.micro_batch_size={sizes.micro_batch_size} * {sizes.path}.seq_length="
        f"{sizes.seq_length}"
    )
    problems += context_problems(key, tokens, mesh.cp, mesh.tp if mesh.sequence_parallel else 1)
    return problems + _context_problems(sizes, model)


def _context_problems(sizes: RowSizes, model: ModelConfig) -> list[str]:
    """Return whether rows are longer than the position embedding is meant for."""
    factor = sizes.rotary_scaling_factor
    if not (factor >= 1 and isfinite(factor)):
        return [
            f"{sizes.path}: rotary_scaling_factor={factor} is not 1 or more; 1 leaves the position "
            "embedding as it is, 4 stretches it four times"
        ]
    if factor > 1 and model.original_max_position_embeddings is None:
        return [
            f"{sizes.path}: rotary_scaling_factor={factor} stretches a context that is not given; "
            "set model.original_max_position_embeddings to the length trained before"
        ]
    if sizes.seq_length <= context_tokens(model, factor):
        return []
    return [
        f"{sizes.path}.seq_length={sizes.seq_length} exceeds model.max_position_embeddings="
        f"{context_tokens(model, factor)}; shorten the rows, raise the limit, or stretch the "
        f"position embedding with {sizes.path}.rotary_scaling_factor"
        if sizes.path != "train"
        else f"{sizes.path}.seq_length={sizes.seq_length} exceeds model.max_position_embeddings="
        f"{context_tokens(model, factor)}; shorten the rows or raise the limit"
    ]


def context_tokens(model: ModelConfig, rotary_scaling_factor: float) -> int:
    """Return the longest sequence that the position embedding is meant for."""
    original = model.original_max_position_embeddings or model.max_position_embeddings
    return max(model.max_position_embeddings, int(original * rotary_scaling_factor))
