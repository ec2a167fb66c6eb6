"""What a run folder keeps so that the run can be understood and repeated.

Unusual: rank 0 alone writes, but what stops it stops every rank, with the same message.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ring_train.config import Config, read_yaml, to_yaml
from ring_train.data.loader import Batches
from ring_train.errors import UserError
from ring_train.plan import Plan, plan_record

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
PLAN_FILE = "plan.json"
VERSIONS_FILE = "versions.json"
DATA_FILE = "data.json"

PACKAGES = ("torch", "megatron-core", "triton", "transformers", "numpy", "hydra-core", "ring-train")
MAY_CHANGE = (
    *("train.stop_after_step", "train.time_limit_s", "run_dir", "profile", "logging."),
    *("evaluation.interval_steps", "evaluation.max_batch_size", "evaluation.max_prefill_tokens"),
    *("resilience.resume_from_previous", "resilience.hang_", "resilience.io_"),
    *("resilience.stop_margin_s", "resilience.faults", "data.index_dir", "checkpoint.", "machine."),
)
"""Beginnings of the keys that no figure of a run depends on."""


def write_run_record(plan: Plan, batches: Batches, rank: int) -> None:
    """Write config.yaml, plan.json, versions.json and data.json. Collective over all ranks.

    A run folder is resumed, never reused: if it holds the record of other data, that is an error.

    Raises:
        UserError: the folder belongs to a run on other data, or cannot be written.
    """
    problem = [_write_record(plan, batches) if rank == 0 else None]
    torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UserError(problem[0])


def current_versions() -> dict[str, str]:
    """Return what besides config and data the last bits of a run depend on."""
    versions = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu_threads": str(torch.get_num_threads()),
    }
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["commit"] = _commit()
    return versions


def _write_record(plan: Plan, batches: Batches) -> str | None:
    """Write the files; return what prevents it instead of raising, so that it can be sent."""
    run_dir = Path(plan.config.run_dir)
    hashes = batches.data_hashes()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        data_file = run_dir / DATA_FILE
        recorded = json.loads(data_file.read_text()) if data_file.exists() else {}
        changed = [name for name in recorded if recorded[name] != hashes.get(name, recorded[name])]
        if changed:
            return (
                f"run_dir={run_dir} was started on other data of {', '.join(changed)} (see "
                f"{data_file}); a resumed run must read the same tokens: restore the data, name "
                "new data as new domains, or choose another run_dir"
            )
        _warn_of_changes(run_dir / CONFIG_FILE, plan.config)
        _write(data_file, json.dumps(hashes, indent=1))
        _write(run_dir / CONFIG_FILE, to_yaml(plan.config))
        _write(run_dir / PLAN_FILE, json.dumps(plan_record(plan), indent=1))
        _write(run_dir / VERSIONS_FILE, json.dumps(current_versions(), indent=1))
    except (OSError, ValueError) as error:
        return f"run_dir={run_dir}: {error}; repair the folder or choose another run_dir"
    return None


def _warn_of_changes(path: Path, config: Config) -> None:
    """Warn if a resumed run goes on with other values: its record tells the last ones only."""
    if not path.exists():
        return
    before, now = (_flat(dataclasses.asdict(node)) for node in (read_yaml(path), config))
    changes = [
        f"{key}={now.get(key)} (recorded: {before.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changes:
        logger.warning(
            "%s resumes with other values, so reproduce will not repeat it: %s",
            path.parent,
            "; ".join(changes),
        )


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"a.b": value} of nested dicts."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def _commit() -> str:
    """Return the commit of the source tree, with "+changes" if it differs from it."""
    root = Path(__file__).resolve().parents[2]
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
