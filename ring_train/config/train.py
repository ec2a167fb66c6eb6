"""How long, in which batches, and how often to look."""

from dataclasses import dataclass, field

from ring_train.config.choices import Precision


@dataclass(kw_only=True)
class TrainConfig:
    """The training loop."""

    num_steps: int
    """Optimizer steps of the whole run; the horizon of the schedule. 0 = follows from epochs."""
    num_epochs: float | None = None
    """Passes over every domain, times its weight; gives num_steps."""
    seq_length: int
    """Tokens of one packed row."""
    micro_batch_size: int
    """Rows of one forward on one data-parallel rank."""
    global_batch_size: int
    """Rows of one optimizer step over all ranks."""
    precision: Precision
    eval_interval_steps: int
    """0 = no validation."""
    eval_steps: int
    """Micro batches per data-parallel rank and domain of one validation."""
    stop_after_step: int | None = None
    """Stop with a checkpoint after this step of the run; the schedule keeps its horizon."""
    time_limit_s: float | None = None
    """Stop with a checkpoint after this many seconds; null = no limit."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to save and what to keep."""

    interval_steps: int
    """0 = only at the end."""
    keep: int | None
    """Latest checkpoints kept; null = all."""
    async_save: bool = True
    """Train on while a thread writes; false = wait for the disk."""


@dataclass(kw_only=True)
class LoggingConfig:
    """Where figures go besides metrics.jsonl."""

    interval_steps: int
    tensorboard: bool
    progress: bool | None
    """Progress bar instead of plain lines; null = if standard error is a terminal."""
    stragglers: bool = True
    """Measure each rank's own seconds per step."""
    profile_steps: list[int] | None = None
    """First and last step, numbered as in metrics.jsonl, that `profile=true` traces; null = the
    third and fourth of this start."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Global ranks that are traced."""
    wandb: str | None = None
    """Project at Weights & Biases; null = none."""
    trackio: str | None = None
    """Project of Trackio; null = none."""
