"""The plan and the data of a run folder, for commands that look at a run without training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ring_train.config import Config, read_yaml
from ring_train.errors import UserError
from ring_train.plan import Plan, make_plan

if TYPE_CHECKING:
    from ring_train.data.loader import Batches


def open_run(folder: Path) -> tuple[Plan, Batches]:
    """Return the plan that a run folder records and the batches it reads.

    Raises:
        UserError: the folder is not a run's, or its data is not what the run read.
    """
    from ring_train.data.loader import build_batches
    from ring_train.data.mixture import check_same_samples

    files = ("config.yaml", "plan.json", "data.json")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"run={folder} has no {', '.join(missing)}; name the folder of a run that has trained"
        )
    config: Config = read_yaml(folder / "config.yaml")
    world_size = read_json(folder / "plan.json")["mesh"]["world_size"]
    data = dataclasses.replace(
        config.data, index_dir=config.data.index_dir or str(folder / "index")
    )
    plan = make_plan(dataclasses.replace(config, data=data), world_size)
    batches = build_batches(plan)
    check_data(folder, read_json(folder / "data.json"), batches)
    states = sorted(folder.glob("checkpoints/step_*/train_state.json"))
    if states:
        state = read_json(states[-1])
        samples = state["consumed_samples"]
        check_same_samples(state.get("mixture", []), batches.mixture_record(), samples)
    return plan, batches


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of a run, or raise a UserError."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it from a copy") from error


def check_data(folder: Path, recorded: dict[str, str], batches: Batches) -> None:
    """Raise a UserError unless the shards are those of the record."""
    now = batches.data_hashes()
    differing = sorted(
        name for name in now.keys() | recorded.keys() if now.get(name) != recorded.get(name)
    )
    if differing:
        raise UserError(
            f"run={folder} was trained on other data: {', '.join(differing)} differ from "
            "its data.json; restore the shards"
        )
