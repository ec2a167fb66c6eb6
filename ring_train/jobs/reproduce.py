"""Run a recorded run again and compare: `python -m ring_train.jobs.reproduce run=DIR`.

Start it on as many ranks as the record says, under torchrun if more than one; `run_dir=DIR2` says
where to. Exits 0 if every record of metrics.jsonl comes out bit-equal, 1 if one differs, 2 if the
run cannot be repeated.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from ring_train.config import Config, DataConfig, ReproduceConfig, compose, read_yaml
from ring_train.errors import UserError
from ring_train.jobs.recorded_run import check_data
from ring_train.plan import make_plan
from ring_train.resilience.journal import read_journal, skipped_steps
from ring_train.runtime.errors import run_job

DIFFERENT_STATUS = 1
METRICS_FILE = "metrics.jsonl"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a run folder says about its run."""

    folder: Path
    config: Config
    world_size: int
    data_hashes: dict[str, str]
    versions: dict[str, str]


def main(overrides: list[str]) -> None:
    """Repeat the run that the overrides name; exit 1 if it comes out otherwise."""
    from ring_train.data.loader import build_batches
    from ring_train.jobs.pretrain import pretrain
    from ring_train.runtime.logs import start_logs

    rank = int(os.environ.get("RANK", "0"))
    start_logs(rank)
    request: ReproduceConfig = compose("reproduce", overrides)
    recorded = read_recorded(Path(request.run))
    check_world_size(recorded, overrides)
    run_dir = Path(request.run_dir or f"{recorded.folder}-reproduced")
    check_new(run_dir)
    config = repeated_config(recorded, run_dir)
    batches = build_batches(make_plan(config, recorded.world_size))
    check_data(recorded.folder, recorded.data_hashes, batches)
    if rank == 0:
        check_bytes(config.data)
        warn_of_versions(recorded)
    pretrain(config)
    if rank == 0:
        difference = first_difference(recorded.folder / METRICS_FILE, run_dir / METRICS_FILE)
        sys.stdout.write(f"{recorded.folder} and {run_dir}: {difference or 'bit-equal'}\n")
        if difference:
            sys.exit(DIFFERENT_STATUS)


def read_recorded(folder: Path) -> Recorded:
    """Return the record of a run folder.

    Raises:
        UserError: a file of the record is missing or damaged.
    """
    from ring_train.train.record import CONFIG_FILE, DATA_FILE, PLAN_FILE, VERSIONS_FILE

    files = (CONFIG_FILE, PLAN_FILE, DATA_FILE, VERSIONS_FILE, METRICS_FILE)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"run={folder} lacks {', '.join(missing)}; name the folder of a run that has trained"
        )
    try:
        return Recorded(
            folder=folder,
            config=read_yaml(folder / CONFIG_FILE),
            world_size=json.loads((folder / PLAN_FILE).read_text())["mesh"]["world_size"],
            data_hashes=json.loads((folder / DATA_FILE).read_text()),
            versions=json.loads((folder / VERSIONS_FILE).read_text()),
        )
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(
            f"run={folder}: its record is damaged ({error!r}); restore its files"
        ) from error


def check_world_size(recorded: Recorded, overrides: list[str]) -> None:
    """Raise unless this job has as many ranks as the recorded one."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = recorded.world_size
    if world_size != wanted:
        start = f"torchrun --nproc-per-node {wanted}" if wanted > 1 else "python"
        raise UserError(
            f"run={recorded.folder} was trained on {wanted} ranks, but this job has {world_size}; "
            f"start `{start} -m ring_train.jobs.reproduce {' '.join(overrides)}`"
        )


def check_new(run_dir: Path) -> None:
    """Raise unless a run can start in the folder, rather than resume."""
    if run_dir.exists() and not (run_dir.is_dir() and not any(run_dir.iterdir())):
        raise UserError(
            f"run_dir={run_dir} exists, and a repetition starts from nothing; "
            "remove it or choose another run_dir"
        )


def repeated_config(recorded: Recorded, run_dir: Path) -> Config:
    """Return the recorded config, made to stop where the run stopped, for whatever reason.

    Steps that the run passed over are passed over again, and no faults are injected.

    Raises:
        UserError: nothing to compare was recorded.
    """
    steps = [record["step"] for record in read_records(recorded.folder / METRICS_FILE)]
    if not steps:
        raise UserError(
            f"{recorded.folder / METRICS_FILE} has no record; a run without figures cannot be "
            "compared"
        )
    saved = recorded.folder.glob("checkpoints/step_*")
    steps += [int(path.name[5:]) for path in saved if path.name[5:].isdigit()]
    config = recorded.config
    train = dataclasses.replace(config.train, stop_after_step=max(steps), time_limit_s=None)
    data = dataclasses.replace(
        config.data, index_dir=config.data.index_dir or str(recorded.folder / "index")
    )
    passed_over = skipped_steps(read_journal(recorded.folder)) | set(config.resilience.skip_steps)
    resilience = dataclasses.replace(config.resilience, skip_steps=sorted(passed_over), faults=[])
    return dataclasses.replace(
        config, run_dir=str(run_dir), train=train, data=data, resilience=resilience
    )


def check_bytes(data: DataConfig) -> None:
    """Raise unless every shard holds the bytes that its manifest, and so the record, states."""
    pairs = ((domain.path, domain.valid_path) for domain in data.domains.values())
    for prefix in filter(None, itertools.chain.from_iterable(pairs)):
        manifest = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
        for kind in ("bin", "idx"):
            with Path(f"{prefix}.{kind}").open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != manifest[f"{kind}_sha256"]:
                raise UserError(
                    f"{prefix}.{kind} is not the file that {prefix}.json describes; "
                    "restore the shard"
                )


def warn_of_versions(recorded: Recorded) -> None:
    """Warn of versions and a commit other than the recorded ones: they may change the last bits."""
    from ring_train.train.record import current_versions

    now, then = current_versions(), recorded.versions
    changes = [
        f"{name} {now.get(name)} (recorded: {then.get(name)})"
        for name in sorted(now.keys() | then.keys())
        if now.get(name) != then.get(name)
    ]
    if changes:
        logger.warning("not everything is as recorded: %s", "; ".join(changes))
    if then.get("commit", "").endswith("+changes"):
        logger.warning("the recorded commit had changes that nothing tells: %s", then["commit"])


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file; a torn last line, of a killed run, is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def first_difference(recorded: Path, repeated: Path) -> str | None:
    """Return the step and key in which two files of records first differ, or None."""
    for old, new in itertools.zip_longest(read_records(recorded), read_records(repeated)):
        if new is None or (old is not None and old["step"] < new["step"]):
            return f"step {old['step']} is recorded but was not repeated"
        if old is None or old["step"] > new["step"]:
            return f"step {new['step']} is new, not recorded"
        for key in old | new:
            before, after = (json.dumps(record.get(key)) for record in (old, new))
            if before != after:
                return f"step {old['step']}, {key}: {before} recorded, {after} repeated"
    return None


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
