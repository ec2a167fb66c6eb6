"""Figures of a run to Weights & Biases or Trackio, beside metrics.jsonl and TensorBoard.

Their packages are imported only if `logging.wandb` or `logging.trackio` names a project; neither is
among the dependencies. All starts of a run are one run there: its id is in RUN_DIR/tracker.json.

Unusual: neither can forget what it was told, so steps that are trained again after a crash or a
roll-back are told again. The x axis is a figure of its own, `step`: curves go back and over, and
nothing that comes later is refused. metrics.jsonl alone is what the run is.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from ring_train.errors import UserError
from ring_train.plan import Plan

logger = logging.getLogger(__name__)

ID_FILE = "tracker.json"


class Tracker(Protocol):
    """Where figures go besides files."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Take figures of a step."""

    def finish(self) -> None:
        """Send what is left."""


class WandbTracker:
    """A run at Weights & Biases."""

    def __init__(self, plan: Plan, project: str) -> None:
        wandb = _import("wandb", project)
        run_dir = Path(plan.config.run_dir)
        try:
            self.run = wandb.init(
                project=project,
                id=run_id(run_dir),
                name=run_dir.resolve().name,
                resume="allow",
                dir=str(run_dir),
                config=_plain_config(plan),
            )
        except Exception as error:  # wandb raises its own kinds, which are not known here
            raise UserError(
                f"logging.wandb={project}: {_first_line(error)}; log in (WANDB_API_KEY), set "
                "WANDB_MODE=offline and send the run later with `wandb sync`, or leave the word out"
            ) from error
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See Tracker."""
        self.run.log({"step": step, **figures})

    def finish(self) -> None:
        """See Tracker."""
        self.run.finish()


class TrackioTracker:
    """A run in Trackio's database; TRACKIO_DIR says where that is."""

    def __init__(self, plan: Plan, project: str) -> None:
        trackio = _import("trackio", project)
        run_dir = Path(plan.config.run_dir)
        name = f"{run_dir.resolve().name}-{run_id(run_dir)}"
        try:
            self.run = trackio.init(
                project=project, name=name, resume="allow", config=_plain_config(plan)
            )
        except Exception as error:  # trackio raises its own kinds, which are not known here
            raise UserError(
                f"logging.trackio={project}: {_first_line(error)}; mend that or leave the word out"
            ) from error

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See Tracker."""
        self.run.log(dict(figures), step=step)

    def finish(self) -> None:
        """See Tracker."""
        self.run.finish()


class Trackers:
    """All trackers of a run; one that fails is left out from then on, and training goes on.

    Raises:
        UserError: a package is not installed, or a run cannot be begun.
    """

    def __init__(self, plan: Plan) -> None:
        logs = plan.config.logging
        self._open: list[Tracker] = []
        if logs.wandb is not None:
            self._open.append(WandbTracker(plan, logs.wandb))
        if logs.trackio is not None:
            self._open.append(TrackioTracker(plan, logs.trackio))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Hand figures on; NaN and infinities, too, but no texts."""
        for tracker in [*self._open]:
            try:
                tracker.log(figures, step)
            except Exception as error:  # of packages that are not ours
                self._drop(tracker, error)

    def finish(self) -> None:
        """Send what is left."""
        for tracker in [*self._open]:
            try:
                tracker.finish()
            except Exception as error:  # of packages that are not ours
                self._drop(tracker, error)

    def _drop(self, tracker: Tracker, error: Exception) -> None:
        self._open.remove(tracker)
        name = type(tracker).__name__
        logger.warning("%s is left out from now on: %s", name, _first_line(error))


def run_id(run_dir: Path) -> str:
    """Return the id under which trackers know a run; made once, and kept in its folder."""
    path = run_dir / ID_FILE
    try:
        return str(json.loads(path.read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        made = secrets.token_hex(4)
    path.write_text(json.dumps({"id": made}) + "\n")
    return made


def _import(package: str, project: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"logging.{package}={project} needs the package {package}, which cannot be imported "
            f"({error}); pip install {package}, or leave the word out"
        ) from error


def _plain_config(plan: Plan) -> dict[str, Any]:
    """Return the config as trackers take it."""
    return json.loads(json.dumps(dataclasses.asdict(plan.config), default=str))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
