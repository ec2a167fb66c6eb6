"""Write arithmetic as chat data, with problems: `python -m data_pipeline.math_conversations`.

    output=DIR [conversations=N] [answers=N] [problems=N] [seed=N]

receives in DIR

- `chain.jsonl`: conversations about three operands whose reasoning is a worked chain;
- `answer.jsonl`: such conversations with the bare answer, the control;
- `three_operands.jsonl`, `four_operands.jsonl`, `multiplication.jsonl`: problems with answers.

Operands have two digits. Problems of three operands are held out as in the `math` domain of
`data_pipeline.demo_corpus`: no reordering of one is in a conversation, or in that domain's
training split. Conversations of four operands or products are not written: what a model makes of
them it has from three operands.
"""

import dataclasses
import itertools
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.config import PipelineError, run_command
from data_pipeline.documents import file_sha256, write_json
from data_pipeline.math_problems import Expression, Problem, distinct_problems, is_held_out

HELD_OUT_FRACTION = 0.1
"""The share of problems that `demo_corpus` keeps from training."""
OPERANDS = range(10, 100)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MathConversations:
    """Arguments."""

    output: str
    """Folder."""
    conversations: int = 12_000
    """With a chain."""
    answers: int = 40_000
    """With the bare answer; shorter, so that as many tokens need more."""
    problems: int = 200
    """Of each kind."""
    seed: int = 1234


def main() -> int:
    """Write the files and return the exit status."""
    return run_command(MathConversations, write_math_conversations)


def write_math_conversations(arguments: MathConversations) -> None:
    """Write all files, and manifest.json last."""
    counts = {"conversations": arguments.conversations, "answers": arguments.answers}
    for key, value in (counts | {"problems": arguments.problems}).items():
        if value < 1:
            raise PipelineError(f"{key}={value} is not positive; choose 1 or more")
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "manifest.json").unlink(missing_ok=True)
    seeds = itertools.count(arguments.seed)
    train = (p for p in sums(next(seeds), num_operands=3) if not held_out(p))
    direct = (p for p in sums(next(seeds), num_operands=3) if not held_out(p))
    three = (p for p in sums(next(seeds), num_operands=3) if held_out(p))
    four = sums(next(seeds), num_operands=4)
    size = arguments.problems
    records: dict[str, Iterable[dict[str, Any]]] = {
        "chain": map(chain_conversation, itertools.islice(train, arguments.conversations)),
        "answer": map(answer_conversation, itertools.islice(direct, arguments.answers)),
        "three_operands": map(problem_record, itertools.islice(three, size)),
        "four_operands": map(problem_record, itertools.islice(four, size)),
        "multiplication": itertools.islice(products(next(seeds)), size),
    }
    files = {name: _write(output / f"{name}.jsonl", of) for name, of in records.items()}
    arguments_used = {k: v for k, v in dataclasses.asdict(arguments).items() if k != "output"}
    write_json(output / "manifest.json", {"arguments": arguments_used, "files": files})


def sums(seed: int, *, num_operands: int) -> Iterator[Problem]:
    """Yield solved sums without end, no two of them reorderings of each other.

    No partial sum is negative; one of three operands stays below 300, one of four below 400.
    """
    rng = random.Random(seed)

    def draw() -> Expression:
        operands = tuple(rng.choice(OPERANDS) for _ in range(num_operands))
        return operands, tuple(rng.choice("+-") for _ in range(num_operands - 1))

    return distinct_problems(draw)


def products(seed: int) -> Iterator[dict[str, Any]]:
    """Yield problems of a two-digit number times a digit, none twice, as records."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in OPERANDS for b in range(2, 10)]
    rng.shuffle(pairs)
    for a, b in pairs:
        text = f"{a} * {b}"
        yield {"id": text, "problem": f"Compute {text}.", "answer": str(a * b)}


def held_out(problem: Problem) -> bool:
    """Return whether no reordering of a problem may be trained on."""
    return is_held_out(problem, fraction=HELD_OUT_FRACTION)


def question(problem: Problem) -> str:
    """Return what the user asks."""
    return problem.line().split(". ", 1)[0] + "."


def chain_conversation(problem: Problem) -> dict[str, Any]:
    """Return a conversation that reasons in digit tables before it answers."""
    answer = {"role": "assistant", "reasoning_content": problem.chain, "content": boxed(problem)}
    return {"messages": [{"role": "user", "content": question(problem)}, answer]}


def answer_conversation(problem: Problem) -> dict[str, Any]:
    """Return a conversation that answers at once."""
    answer = {"role": "assistant", "content": boxed(problem)}
    return {"messages": [{"role": "user", "content": question(problem)}, answer]}


def problem_record(problem: Problem) -> dict[str, Any]:
    """Return the record of a problem to be solved."""
    text = question(problem)
    name = text.removeprefix("Compute ").removesuffix(".")
    return {"id": name, "problem": text, "answer": str(problem.answer)}


def boxed(problem: Problem) -> str:
    """Return the final answer as it is graded."""
    return f"\\boxed{{{problem.answer}}}"


def _write(path: Path, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Write JSON lines; return what the manifest says of the file."""
    lines = [json.dumps(record) + "\n" for record in records]
    path.write_text("".join(lines), encoding="ascii")
    return {"records": len(lines), "sha256": file_sha256(path)}


if __name__ == "__main__":
    sys.exit(main())
