"""Trackers are optional, one run for all starts, and never the end of a run.

The packages are no dependencies of the project, so a stand-in takes their place; that real ones
take the same calls was tried by hand (docs/observing.md).
"""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ring_train.config import compose
from ring_train.errors import UserError
from ring_train.plan import Plan, make_plan
from ring_train.train.trackers import Trackers


def plan_of(run_dir: Path, *words: str) -> Plan:
    return make_plan(compose("pretrain", ["model=tiny", f"run_dir={run_dir}", *words]), 1)


class FakePackage:
    """Takes the calls of wandb and of trackio."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int | None]] = []
        self.refuses = False

    def init(self, **words: Any) -> SimpleNamespace:
        if self.refuses:
            raise ConnectionError("the service is away\nand more")
        self.begun.append(words)
        return SimpleNamespace(log=self.log, finish=lambda: None, define_metric=lambda *_, **__: 0)

    def log(self, figures: dict[str, float], step: int | None = None) -> None:
        if self.refuses:
            raise ConnectionError("the service is away")
        self.logged.append((figures, step))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> FakePackage:
    fake = FakePackage()
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, fake)
    return fake


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_that_is_missing_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"logging.{name}=p needs the package .*pip install {name}"):
        Trackers(plan_of(tmp_path, f"logging.{name}=p"))


def test_nothing_is_imported_unless_asked_for(tmp_path: Path, package: FakePackage) -> None:
    Trackers(plan_of(tmp_path)).log({"x": 1.0}, 1)
    assert package.begun == []
    assert not list(tmp_path.iterdir())


def test_all_starts_are_one_run(tmp_path: Path, package: FakePackage) -> None:
    for _ in range(2):
        Trackers(plan_of(tmp_path, "logging.wandb=p", "logging.trackio=q")).log({"x": 1.0}, 7)
    first, second = package.begun[0], package.begun[2]
    assert first["id"] == second["id"]
    assert first["resume"] == second["resume"] == "allow"
    assert package.begun[1]["name"] == package.begun[3]["name"]
    assert package.logged[:2] == [({"step": 7, "x": 1.0}, None), ({"x": 1.0}, 7)]


def test_the_first_start_refuses_a_service_that_is_away_and_later_ones_do_not(
    tmp_path: Path, package: FakePackage, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of(tmp_path, "logging.wandb=p")
    package.refuses = True
    with pytest.raises(UserError, match=r"logging.wandb=p: the service is away; log in"):
        Trackers(plan)
    package.refuses = False
    Trackers(plan)
    package.refuses = True
    with caplog.at_level(logging.WARNING):
        Trackers(plan).log({"x": 1.0}, 1)
    assert "goes on without it" in caplog.text


def test_a_tracker_that_fails_is_left_out(
    tmp_path: Path, package: FakePackage, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = Trackers(plan_of(tmp_path, "logging.wandb=p"))
    package.refuses = True
    with caplog.at_level(logging.WARNING):
        trackers.log({"x": 1.0}, 1)
    package.refuses = False
    trackers.log({"x": 1.0}, 2)
    trackers.finish()
    assert package.logged == []
    assert "left out from now on: the service is away" in caplog.text
