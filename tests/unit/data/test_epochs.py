"""Epochs become steps and rows, exactly."""

import dataclasses
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ring_train.config import Config, Packing, PhaseConfig
from ring_train.data.epochs import count_epochs
from ring_train.data.errors import DataError
from ring_train.data.loader import build_batches
from ring_train.plan import PlanError, make_plan
from tests.unit.data.shard_files import make_data_plan

SEQ_LENGTH = 64
"""Longer than any document of the shards, so that none is cut."""


def epoch_config(folder: Path, epochs: float | None, packing: Packing = Packing.whole) -> Config:
    """Return the config of a run over `code` (weight 1) and `math` (weight 2)."""
    changes = {"train.seq_length": SEQ_LENGTH, "train.global_batch_size": 4}
    config = make_data_plan(folder, **changes).config
    config.train = dataclasses.replace(config.train, num_steps=0, num_epochs=epochs)
    config.data.packing = packing
    return config


def rows_in_epoch(config: Config) -> dict[str, int]:
    """Return the packed rows of one pass."""
    counted = count_epochs(dataclasses.replace(config))
    streams = build_batches(make_plan(counted, 1)).mixture.streams
    return {name: stream.epoch_length for name, stream in streams.items()}


@pytest.mark.parametrize("epochs", [1, 3, 2.5])
def test_every_row_is_read_as_often_as_asked(tmp_path: Path, epochs: float) -> None:
    config = epoch_config(tmp_path, epochs)
    config.data.domains["math"].weight = 1.0
    plan = make_plan(count_epochs(config), 1)
    batches = build_batches(plan)
    rows = {name: round(epochs * count) for name, count in rows_in_epoch(config).items()}
    total = sum(rows.values())
    assert plan.phases[0].num_steps == -(-total // 4) == plan.config.train.num_steps
    places = [batches.mixture.place(sample) for sample in range(total)]
    read = Counter((batches.mixture.domains[place.domain]) for place in places)
    assert read == rows, "exact where the epochs end, before the last step is filled"
    positions = {(place.domain, place.position) for place in places}
    assert len(positions) == total, "no row is skipped or read twice"


def test_a_weight_is_a_factor_on_the_passes(tmp_path: Path) -> None:
    config = epoch_config(tmp_path, 2)
    in_epoch = rows_in_epoch(config)
    counted = count_epochs(config)
    assert counted.phases["train"].weights == {
        "code": 2 * in_epoch["code"],
        "math": 4 * in_epoch["math"],
    }
    assert counted.train.num_epochs is None
    assert counted.data.domains["math"].weight == 2.0, "what the person wrote stays"


def test_contiguous_rows_are_counted_by_tokens(tmp_path: Path) -> None:
    config = epoch_config(tmp_path, 1, Packing.contiguous)
    counted = count_epochs(config)
    shards = build_batches(make_plan(counted, 1)).shards
    expected = {name: shard.num_tokens // SEQ_LENGTH for name, shard in shards.items()}
    weights = {"code": 1, "math": 2}
    assert counted.phases["train"].weights == {n: expected[n] * weights[n] for n in expected}


def test_phases_have_epochs_of_their_own(tmp_path: Path) -> None:
    config = epoch_config(tmp_path, None)
    in_epoch = rows_in_epoch(epoch_config(tmp_path, 1))
    config.phases = {
        "first": PhaseConfig(num_epochs=2, weights={"math": 1.0}),
        "mixed": PhaseConfig(num_epochs=1, weights={"math": 0.5, "code": 1.0}),
        "rest": PhaseConfig(num_steps=3, weights={"code": 1.0}),
    }
    counted = count_epochs(config)
    assert counted.phases["first"].weights == {"math": 2 * in_epoch["math"]}
    assert counted.phases["mixed"].weights == {
        "math": round(0.5 * in_epoch["math"]),
        "code": in_epoch["code"],
    }
    assert counted.phases["rest"] is config.phases["rest"]
    steps = [phase.num_steps for phase in make_plan(counted, 1).phases]
    assert sum(steps) == counted.train.num_steps
    assert steps[0] == -(-2 * in_epoch["math"] // 4)


def test_what_was_counted_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        counted = count_epochs(epoch_config(tmp_path, 2))
    assert "2 epochs of code" in caplog.text
    assert f"rows in {counted.train.num_steps} steps" in caplog.text


def test_without_domains_there_is_nothing_to_count(tmp_path: Path) -> None:
    config = epoch_config(tmp_path, 1)
    config.data.domains = {}
    with pytest.raises(DataError, match=r"data.domains is empty.*train.num_steps=N"):
        count_epochs(config)


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_a_weight_of_a_domain_that_is_no_factor_is_refused(tmp_path: Path, weight: float) -> None:
    config = epoch_config(tmp_path, 1)
    config.data.domains["math"].weight = weight
    with pytest.raises(DataError, match=rf"^data.domains.math.weight={weight} is not 0 or more"):
        count_epochs(config)


def test_the_phase_of_a_run_in_epochs_is_called_train_in_messages(tmp_path: Path) -> None:
    counted = count_epochs(epoch_config(tmp_path, 1))
    counted.model.max_position_embeddings = SEQ_LENGTH - 1
    with pytest.raises(PlanError, match=r"^train.seq_length=64 exceeds"):
        make_plan(counted, 1)


@pytest.mark.parametrize(
    ("train", "phases", "message"),
    [
        ({"num_epochs": 0.0}, {}, r"train.num_epochs=0.0 is not above 0 .*; choose e.g. 3"),
        ({"num_epochs": float("nan")}, {}, r"train.num_epochs=nan is not above 0"),
        ({"num_epochs": 1e300}, {}, r"num_epochs=1e\+300 is not above 0 and at most 1000000"),
        ({"num_steps": 9}, {"a": {"num_epochs": 1}}, r"train.num_steps=9, but the epochs of the"),
        (
            {},
            {"a": {"num_epochs": 1, "weights": {"math": 1.0, "code": float("nan")}}},
            r"phases.a.weights.code=nan is not 0 or more",
        ),
        ({}, {"a": {"num_epochs": 1, "weights": {"math": -1.0}}}, r"weights.math=-1.0 is not 0"),
        ({"num_epochs": 3, "num_steps": 7}, {}, r"train.num_steps=7 both give the length"),
        ({"num_epochs": 3}, {"a": {"num_steps": 2}}, r"which of the phases a it is for"),
        ({}, {"a": {"num_epochs": 1, "num_steps": 2}}, r"phases.a.num_steps exclude each other"),
        ({}, {"a": {"num_epochs": 1, "tokens": {"math": 64}}}, r"phases.a.tokens exclude"),
        ({}, {"a": {"num_epochs": 1, "weights": {"math": 0.0}}}, r"no domain has a weight"),
        ({}, {"a": {"num_epochs": 1, "weights": {"mth": 1}}}, r"weights.mth: no such .*math"),
        ({"num_epochs": 1, "seq_length": 0}, {}, r"train.seq_length=0 and .* must be positive"),
        ({"num_epochs": 1, "seq_length": 16}, {}, r"documents are longer than seq_length=16"),
    ],
)
def test_wrong_epochs_are_refused(
    tmp_path: Path, train: dict[str, Any], phases: dict[str, dict[str, Any]], message: str
) -> None:
    config = epoch_config(tmp_path, None)
    config.train = dataclasses.replace(config.train, **train)
    config.phases = {name: PhaseConfig(**phase) for name, phase in phases.items()}
    with pytest.raises(DataError, match=message):
        count_epochs(config)
