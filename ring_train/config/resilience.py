"""What a run does when something goes wrong."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class ResilienceConfig:
    """Bad steps, damaged checkpoints, failing disks, hangs and the end of the allotted time."""

    rerun_bad_steps: bool = True
    """Compute a bad step once more before anything is given up: what was a fault of the machine is
    gone then, and the run is what it would have been."""
    spike_sigma: float | None = None
    """A loss or gradient norm this many standard deviations above the mean of the last accepted
    steps is a spike; null = only NaN and Inf are bad."""
    spike_window_steps: int = 128
    """Steps of that mean; nothing is judged before half of them are there."""
    max_skipped_in_a_row: int = 3
    """Bad steps without an update, one after another, before the run rolls back."""
    max_roll_backs: int = 2
    """Of the whole run, before it stops for a person; 0 = stop at once."""
    skip_steps: list[int] = field(default_factory=list)
    """Steps, numbered as in metrics.jsonl, whose data is passed over without an update."""
    resume_from_previous: bool = False
    """Set a damaged newest checkpoint aside and go on from the one before; false = stop."""
    hang_timeout_s: float | None = 600.0
    """Without progress for so long, a rank dumps its stacks and ends the job; null = never."""
    hang_grace_s: float = 10.0
    """For the other ranks to dump theirs."""
    io_patience_s: float = 300.0
    """How long writing is tried again when the disk is full or fails, before the run stops."""
    stop_margin_s: float = 10.0
    """Kept free before the deadline, besides the measured time of a step and of a save."""
    faults: list[str] = field(default_factory=list)
    """Faults to inject, for tests: see ring_train/resilience/faults.py."""
