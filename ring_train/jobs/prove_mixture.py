"""Compute a run's ledgers again: `python -m ring_train.jobs.prove_mixture run=RUN_DIR [sample=N]`.

Every checkpoint says how many tokens of each domain the trainer has read; the plan says how many
that must be. Exits 0 if all agree, 1 if one does not.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from ring_train.config import ProveMixtureConfig, compose
from ring_train.errors import UserError
from ring_train.jobs.recorded_run import read_json
from ring_train.runtime.errors import run_job

DIFFERENT_STATUS = 1


def main(overrides: list[str]) -> None:
    """Compare the ledgers of the run that the overrides name with its plan."""
    request: ProveMixtureConfig = compose("prove_mixture", overrides)

    from ring_train.data.ledger import make_ledger
    from ring_train.jobs.mixture_table import mixture_table
    from ring_train.jobs.recorded_run import open_run

    plan, batches = open_run(Path(request.run))
    mixture = batches.mixture
    sys.stdout.write(mixture_table(mixture))
    if request.sample is not None:
        end = sum(phase.num_samples for phase in plan.phases)
        if not 0 <= request.sample <= end:
            raise UserError(f"sample={request.sample} is beyond the run; choose 0 to {end}")
        tokens = mixture.tokens_before(request.sample)
        ledger = make_ledger(plan.phases, mixture.domains, tokens)
        sys.stdout.write(f"after {request.sample} samples: {json.dumps(ledger)}\n")
    wrong = 0
    records = recorded_ledgers(Path(request.run))
    for name, record in records:
        tokens = mixture.tokens_before(record["samples"])
        planned = make_ledger(plan.phases, mixture.domains, tokens)
        if planned == record["ledger"]:
            continue
        wrong += 1
        sys.stdout.write(
            f"{name} after {record['samples']} samples: read {json.dumps(record['ledger'])}, "
            f"but the plan says {json.dumps(planned)}\n"
        )
    verdict = "all agree with the plan" if not wrong else f"{wrong} differ from the plan"
    sys.stdout.write(f"{len(records)} ledgers: {verdict}\n")
    if wrong:
        sys.exit(DIFFERENT_STATUS)


def recorded_ledgers(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (where, {"samples", "ledger"}) of every checkpoint and every line of ledger.jsonl.

    Raises:
        UserError: the run holds none.
    """
    found = []
    for path in sorted(folder.glob("checkpoints/step_*/train_state.json")):
        state = read_json(path)
        if not isinstance(state, dict) or not state.get("mixture"):
            continue  # of a version without ledgers
        samples, ledger = state["consumed_samples"], state["ledger"]
        found.append((path.parent.name, {"samples": samples, "ledger": ledger}))
    log = folder / "ledger.jsonl"
    for line in log.read_text().splitlines() if log.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run
            record = json.loads(line)
            entry = {"samples": record["samples"], "ledger": record["tokens"]}
            found.append((f"step {record['step']}", entry))
    if not found:
        raise UserError(f"run={folder} has no checkpoint and no ledger.jsonl; train first")
    return found


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
