"""What a phase changes in the model is what the same value does in a run without phases."""

from pathlib import Path

import pytest

from tests.conftest import OnRanks
from tests.parallel.test_resume import digests, run_until

NUM_STEPS = 2
CONTEXT = "model.original_max_position_embeddings=64"
PHASE = ["phases.only.num_steps=20"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rotary_base", "50.0"),
        ("rotary_scaling_factor", "4.0"),
        ("moe_router_bias_update_rate", "0.25"),
    ],
)
def test_a_phase_trains_with_its_own_value(
    key: str, value: str, on_ranks: OnRanks, tmp_path: Path
) -> None:
    on_ranks(1, run_three, tmp_path, key, value)
    folders = [tmp_path / str(number) for number in range(3)]
    plain, given, in_phase = (digests(folder, NUM_STEPS) for folder in folders)
    assert in_phase == given != plain
    metrics = [(folder / "metrics.jsonl").read_text() for folder in folders]
    assert metrics[2] == metrics[1] != metrics[0] != ""


def run_three(folder: Path, key: str, value: str) -> None:
    """Run without the value, with it in the model, and in a phase, each in a folder of its own."""
    changes = [[], [f"model.{key}={value}"], [*PHASE, f"phases.only.{key}={value}"]]
    for number, change in enumerate(changes):
        run_until(folder / str(number), NUM_STEPS, [CONTEXT, *change])
