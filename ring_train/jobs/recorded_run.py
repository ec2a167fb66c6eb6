"""The plan and the data of a run folder, for commands that look at a run without training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

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

    if not (folder / "plan.json").is_file():
        raise UserError(f"run={folder} has no plan.json; name the folder of a run that has trained")
    config: Config = read_yaml(folder / "config.yaml")
    world_size = json.loads((folder / "plan.json").read_text())["mesh"]["world_size"]
    data = dataclasses.replace(
        config.data, index_dir=config.data.index_dir or str(folder / "index")
    )
    plan = make_plan(dataclasses.replace(config, data=data), world_size)
    batches = build_batches(plan)
    recorded = json.loads((folder / "data.json").read_text())
    now = batches.data_hashes()
    changed = sorted(name for name in recorded if recorded[name] != now.get(name))
    if changed:
        raise UserError(
            f"run={folder} read other data of {', '.join(changed)} than is there now; "
            "restore the shards"
        )
    return plan, batches
