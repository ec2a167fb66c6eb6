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

    WAY_OUT = (
        "log in (WANDB_API_KEY), set WANDB_MODE=offline and send the run later with `wandb sync`, "
        "or leave the word out"
    )

    def __init__(self, plan: Plan, project: str, run_id: str) -> None:
        run_dir = Path(plan.config.run_dir)
        self.run = importlib.import_module("wandb").init(
            project=project,
            id=run_id,
            name=run_dir.resolve().name,
            resume="allow",
            dir=str(run_dir),
            config=_plain_config(plan),
        )
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

    WAY_OUT = "mend that or leave the word out"

    def __init__(self, plan: Plan, project: str, run_id: str) -> None:
        name = f"{Path(plan.config.run_dir).resolve().name}-{run_id}"
        self.run = importlib.import_module("trackio").init(
            project=project, name=name, resume="allow", config=_plain_config(plan)
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See Tracker."""
        self.run.log(dict(figures), step=step)

    def finish(self) -> None:
        """See Tracker."""
        self.run.finish()


KINDS: dict[str, type[WandbTracker] | type[TrackioTracker]] = {
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
}
"""By the name of their package, which is that of their config key."""


class Trackers:
    """All trackers of a run; one that fails is left out from then on, and training goes on.

    The first start of a run is particular: a mistake is best seen while somebody looks. A later one
    trains on, as the services it sends to may be away for a night.

    Raises:
        UserError: a package is not installed; or this is the first start, and one cannot be begun.
    """

    def __init__(self, plan: Plan) -> None:
        logs = plan.config.logging
        projects = {"wandb": logs.wandb, "trackio": logs.trackio}
        self._open: list[Tracker] = []
        wanted = {package: project for package, project in projects.items() if project is not None}
        if not wanted:
            return
        path = Path(plan.config.run_dir) / ID_FILE
        known = read_id(path)
        run_id = known or secrets.token_hex(4)
        for package, project in wanted.items():
            key = f"logging.{package}={project}"
            try:
                self._open.append(KINDS[package](plan, project, run_id))
            except ImportError as error:
                raise UserError(
                    f"{key} needs the package {package}, which cannot be imported ({error}); "
                    f"pip install {package}, or leave the word out"
                ) from error
            except Exception as error:  # of packages that are not ours
                problem = f"{key}: {_first_line(error)}; {KINDS[package].WAY_OUT}"
                if known is None:
                    raise UserError(problem) from error
                logger.warning("%s; this start goes on without it", problem)
        path.write_text(json.dumps({"id": run_id}) + "\n")

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


def read_id(path: Path) -> str | None:
    """Return the id under which trackers know a run; None before its first start with one."""
    try:
        return str(json.loads(path.read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plain_config(plan: Plan) -> dict[str, Any]:
    """Return the config as trackers take it."""
    return json.loads(json.dumps(dataclasses.asdict(plan.config), default=str))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
