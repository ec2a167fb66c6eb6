"""Batch arithmetic: how rows, micro batches and tokens add up to a step and a run."""

from dataclasses import dataclass

from ring_train.config import Config, LrDecayStyle
from ring_train.plan.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Sizes of one micro batch, one step and the whole run."""

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
    total_tokens: int


def make_batch(config: Config, mesh: Mesh) -> BatchPlan:
    """Return the batch sizes; exact where `batch_problems` finds nothing."""
    train = config.train
    tokens_per_step = train.global_batch_size * train.seq_length
    return BatchPlan(
        seq_length=train.seq_length,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        num_micro_batches=train.global_batch_size // (train.micro_batch_size * mesh.dp),
        tokens_per_micro_batch=train.micro_batch_size * train.seq_length,
        tokens_per_step=tokens_per_step,
        total_tokens=tokens_per_step * train.num_steps,
    )


def batch_problems(config: Config, mesh: Mesh) -> list[str]:
    """Return what is wrong with batch sizes and the schedule."""
    train, model = config.train, config.model
    problems = []
    rows = train.micro_batch_size * mesh.dp
    if train.global_batch_size % rows:
        problems.append(
            f"train.global_batch_size={train.global_batch_size} is not divisible by "
            f"train.micro_batch_size={train.micro_batch_size} * data-parallel size {mesh.dp}; "
            f"choose a multiple of {rows}"
        )
    tokens = train.micro_batch_size * train.seq_length
    if mesh.sequence_parallel and tokens % mesh.tp:
        problems.append(
            f"train.micro_batch_size={train.micro_batch_size} * train.seq_length="
            f"{train.seq_length} is not divisible by parallel.tensor_model_parallel_size={mesh.tp}"
            f", which sequence_parallel needs; choose seq_length a multiple of {mesh.tp}"
        )
    if train.seq_length > model.max_position_embeddings:
        problems.append(
            f"train.seq_length={train.seq_length} exceeds model.max_position_embeddings="
            f"{model.max_position_embeddings}; shorten the rows or raise the limit"
        )
    return problems + _schedule_problems(config)


def _schedule_problems(config: Config) -> list[str]:
    """Return what is wrong with the learning-rate schedule."""
    optim = config.optim
    problems = []
    if optim.min_lr > optim.lr:
        problems.append(
            f"optim.min_lr={optim.min_lr} exceeds the peak optim.lr={optim.lr}; lower min_lr"
        )
    anneal = optim.wsd_decay_steps
    if optim.lr_decay_style is not LrDecayStyle.wsd:
        if anneal:
            problems.append(
                f"optim.wsd_decay_steps={anneal} belongs to the wsd schedule, but "
                f"optim.lr_decay_style={optim.lr_decay_style}; set it to 0 or choose wsd"
            )
        anneal = 0
    if optim.lr_warmup_steps + anneal > config.train.num_steps:
        problems.append(
            f"optim.lr_warmup_steps={optim.lr_warmup_steps} + optim.wsd_decay_steps={anneal} "
            f"exceed train.num_steps={config.train.num_steps}; shorten them or train longer"
        )
    return problems
