"""train_state.json: where a run stands."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ring_train.checkpoint.manifest import STATE_FILE, Manifest
from ring_train.checkpoint.reading import read_checked

OPTIMIZER_STEP = "optimizer_step"
"""Key of the updates that were made, which bias correction depends on."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands."""

    step: int = 0
    """Completed optimizer steps."""
    consumed_samples: int = 0
    """Rows of the global sample stream that were trained on."""
    ledger: dict[str, dict[str, int]] = field(default_factory=dict)
    """{phase: {domain: tokens}} that were trained on."""
    mixture: list[dict[str, Any]] = field(default_factory=list)
    """What the samples of each phase depend on, see `ring_train.data.mixture`."""
    skipped_steps: list[int] = field(default_factory=list)
    """Numbers of the steps so far whose data was passed over without an update, ascending."""
    recent: list[list[float]] = field(default_factory=list)
    """[loss in nats, gradient norm] of the last updates, oldest first, if spikes are judged."""


def state_text(state: TrainState, num_updates: int) -> str:
    """Return the content of train_state.json; `read_state` is the inverse."""
    return json.dumps({**asdict(state), OPTIMIZER_STEP: num_updates})


def read_state(folder: Path, manifest: Manifest) -> tuple[TrainState, int]:
    """Return where a run stood and how many updates its optimizer had made.

    Raises:
        CheckpointError: the file is not what was written.
    """
    record = json.loads(read_checked(folder, manifest, STATE_FILE))
    num_updates = record.pop(OPTIMIZER_STEP)
    return TrainState(**record), num_updates
