"""What a run folder keeps so that the run can be understood and repeated."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

from ring_train.config import to_yaml
from ring_train.errors import UserError
from ring_train.plan import Plan, plan_record

PACKAGES = ("torch", "megatron-core", "triton", "transformers", "numpy", "hydra-core", "ring-train")


def write_run_record(plan: Plan, data_hashes: Mapping[str, str]) -> None:
    """Write config.yaml, plan.json, versions.json and data.json into the run folder.

    A run folder is resumed, never reused: if it holds the record of other data, that is an error.

    Raises:
        UserError: the folder belongs to a run on other data.
    """
    run_dir = Path(plan.config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    data_file = run_dir / "data.json"
    if data_file.exists() and json.loads(data_file.read_text()) != dict(data_hashes):
        raise UserError(
            f"run_dir={run_dir} was started on other data (see {data_file}); "
            "a resumed run must read the same tokens: restore the data or choose another run_dir"
        )
    data_file.write_text(json.dumps(dict(data_hashes), indent=1))
    (run_dir / "config.yaml").write_text(to_yaml(plan.config))
    (run_dir / "plan.json").write_text(json.dumps(plan_record(plan), indent=1))
    (run_dir / "versions.json").write_text(json.dumps(_versions(), indent=1))


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["commit"] = _commit()
    return versions


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
