"""Choose the checkpoint to go on from: `python -m ring_train.jobs.select_checkpoint run=DIR`.

Ring-lite starts reinforcement learning from the SFT checkpoint whose token entropy on the problems
is in a window, 0.3 to 0.5 nats, rather than from the best one. The complete checkpoints of the run
that were evaluated while it trained are ranked: inside of `min_entropy` to `max_entropy` first,
then by accuracy, then the earlier; outside by distance to the window. The last line is the folder.

Exits 0 if the chosen one is inside of the window, 1 if none is and the nearest was chosen, 2 if
there is nothing to choose from.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ring_train.config import SelectCheckpointConfig, compose
from ring_train.errors import UserError
from ring_train.jobs.results import write_json
from ring_train.runtime.errors import run_job

OUTSIDE_STATUS = 1
EVALUATION_FILE = "evaluation.jsonl"


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What the evaluation after a step found."""

    step: int
    accuracy: float
    entropy_nats: float
    digest: str | None = None
    """Of problems and sampling; only records of the same one are compared."""
    temperature: float | None = None
    """0 = greedy."""


@dataclass(frozen=True, kw_only=True)
class Candidate(Evaluated):
    """An evaluated checkpoint in its place of the ranking."""

    distance_nats: float
    """Of the entropy to the window; 0 = inside."""
    reason: str
    """Why it is before the next one."""


def main(overrides: list[str]) -> None:
    """Rank the checkpoints of the run that the overrides name."""
    config: SelectCheckpointConfig = compose("select_checkpoint", overrides)
    check_window(config)
    run = Path(config.run)
    evaluated = read_evaluated(run)
    comparable, notes = set_aside(evaluated)

    from ring_train.checkpoint.folders import step_path, whole_steps

    folder = run / "checkpoints"
    saved = whole_steps(folder)
    ranking = rank(
        [item for item in comparable if item.step in saved], config.min_entropy, config.max_entropy
    )
    notes += unmatched(saved, [item.step for item in evaluated])
    if not ranking:
        raise UserError(f"run={run}: {'; '.join(notes)}; {WAY_OUT}")
    best = ranking[0]
    chosen = step_path(folder, best.step)
    if best.distance_nats:
        notes.append(
            f"no entropy is in [{config.min_entropy}, {config.max_entropy}]: the nearest is chosen"
        )
    if config.output:
        record = {
            "chosen": str(chosen),
            "is_inside": not best.distance_nats,
            "min_entropy": config.min_entropy,
            "max_entropy": config.max_entropy,
            "ranking": [asdict(item) for item in ranking],
            "notes": notes,
        }
        write_json(config.output, record)
    sys.stdout.write(table(ranking) + "".join(f"{note}\n" for note in notes) + f"{chosen}\n")
    if best.distance_nats:
        sys.exit(OUTSIDE_STATUS)


WAY_OUT = (
    "set evaluation.interval_steps to a multiple of checkpoint.interval_steps, and checkpoint.keep "
    "to null"
)


def check_window(config: SelectCheckpointConfig) -> None:
    """Raise a UserError for a window that nothing can be in."""
    if not 0 <= config.min_entropy <= config.max_entropy:
        raise UserError(
            f"min_entropy={config.min_entropy} and max_entropy={config.max_entropy} are no window; "
            "give 0 <= min_entropy <= max_entropy"
        )


def read_evaluated(run: Path) -> list[Evaluated]:
    """Return the evaluations of a run, by step.

    Raises:
        UserError: there is none, or its file is damaged.
    """
    path = run / EVALUATION_FILE
    if not path.is_file():
        raise UserError(
            f"run={run} has no {EVALUATION_FILE}; name the folder of a run that was trained with "
            "evaluation.interval_steps"
        )
    by_step: dict[int, Evaluated] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            item = _evaluated(json.loads(line))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(
                f"{path}:{number} is no record of an evaluation ({error!r}); remove the line, or "
                "resume the run, which does"
            ) from None
        by_step[item.step] = item
    return [by_step[step] for step in sorted(by_step)]


def _evaluated(record: dict[str, Any]) -> Evaluated:
    return Evaluated(
        step=int(record["step"]),
        accuracy=_number(record["accuracy"]),
        entropy_nats=_number(record["entropy_nats"]),
        digest=record.get("digest"),
        temperature=record.get("temperature"),
    )


def _number(value: float | None) -> float:
    """Return a figure; null is one that JSON cannot hold."""
    return math.nan if value is None else float(value)


def set_aside(evaluated: list[Evaluated]) -> tuple[list[Evaluated], list[str]]:
    """Return the evaluations that can be compared, and notes of the others and of the sampling."""
    newest = evaluated[-1].digest if evaluated else None
    same = [item for item in evaluated if item.digest == newest]
    finite = [item for item in same if math.isfinite(item.accuracy + item.entropy_nats)]
    notes = [
        f"{reason}: {', '.join(str(item.step) for item in all_ if item not in kept)}"
        for reason, all_, kept in (
            ("set aside, evaluated on other problems or with other sampling", evaluated, same),
            ("set aside, accuracy or entropy is no number", same, finite),
        )
        if len(kept) < len(all_)
    ]
    if any(item.temperature == 0 for item in finite):
        notes.append(
            "answers were greedy: their entropy is lower than that of samples (temperature 1), to "
            "which Ring-lite's window refers"
        )
    return finite, notes


def rank(evaluated: list[Evaluated], low: float, high: float) -> list[Candidate]:
    """Return the candidates, best first.

    Between equal ones the earlier is better: entropy falls with every epoch.
    """

    def distance(item: Evaluated) -> float:
        return max(low - item.entropy_nats, item.entropy_nats - high, 0.0)

    ordered = sorted(evaluated, key=lambda item: (distance(item), -item.accuracy, item.step))
    return [
        Candidate(**asdict(item), distance_nats=distance(item), reason=_reason(item, low, high))
        for item in ordered
    ]


def _reason(item: Evaluated, low: float, high: float) -> str:
    if item.entropy_nats < low:
        return f"{low - item.entropy_nats:.4f} below the window"
    if item.entropy_nats > high:
        return f"{item.entropy_nats - high:.4f} above the window"
    return "inside of the window: by accuracy, then the earlier"


def unmatched(saved: list[int], evaluated: list[int]) -> list[str]:
    """Return what could not be ranked."""
    notes = []
    for steps, lack in (
        (sorted(set(evaluated) - set(saved)), "no complete checkpoint of evaluated steps"),
        (sorted(set(saved) - set(evaluated)), "no evaluation of saved steps"),
    ):
        if steps:
            notes.append(f"{lack}: {', '.join(map(str, steps))}")
    return notes or ["nothing was saved or evaluated"] * (not saved)


def table(ranking: list[Candidate]) -> str:
    """Return a line for each candidate."""
    lines = ["rank      step  accuracy  entropy (nats)  reason"]
    for place, item in enumerate(ranking, start=1):
        figures = f"{item.accuracy:8.4f}  {item.entropy_nats:14.4f}"
        lines.append(f"{place:4d}  {item.step:8d}  {figures}  {item.reason}")
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
