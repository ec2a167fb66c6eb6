"""The stages of a chain as a person writes them: words, options of sbatch, shards."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from data_pipeline.config import parse_arguments
from data_pipeline.sources import find_inputs
from data_pipeline.tokenize import Tokenize
from ring_train.errors import UserError

STAGES = ("data", "build_index", "pretrain", "sft", "export")
"""In the order of a chain; any may be left out, and `data` may come several times."""
LOCATION = Path(__file__).parent


@dataclasses.dataclass
class Stage:
    """One job as a person wrote it."""

    name: str
    options: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Of sbatch: --key -> values."""
    words: list[str] = dataclasses.field(default_factory=list)


def read_stages(arguments: list[str]) -> list[Stage]:
    """Return stages from words.

    Raises:
        UserError: the first word names no stage, or stages are repeated or out of order.
    """
    stages: list[Stage] = []
    for word in arguments:
        if word[-1:] == ":" and word[:-1] in STAGES:
            stages.append(Stage(word[:-1]))
        elif not stages:
            raise UserError(
                f"{word!r} belongs to no stage; begin with one of "
                f"{', '.join(f'{name}:' for name in STAGES)}"
            )
        elif word.startswith("-"):
            key, _, value = word.partition("=")
            stages[-1].options.setdefault(key, []).append(value)
        else:
            stages[-1].words.append(word)
    if not stages:
        raise UserError(
            "no stage is given; write slurm/pipeline.sh pretrain: WORD... export: WORD..."
        )
    names = [stage.name for stage in stages]
    once = [name for name in names if name != "data"]
    if names != sorted(names, key=STAGES.index) or len(once) != len(set(once)):
        raise UserError(
            f"{' '.join(f'{name}:' for name in names)} is no chain; give stages in the order "
            f"{', '.join(STAGES)}, each once and only data several times"
        )
    return stages


def world_sizes(stage: Stage) -> list[int]:
    """Return the numbers of ranks that sbatch may give a stage, largest first."""
    for key in ("-n", "--ntasks", "--ntasks-per-gpu", "--ntasks-per-socket"):
        if key in stage.options:
            raise UserError(f"{stage.name}: {key} - say --nodes=N and --ntasks-per-node=N instead")
    nodes = setting(stage, "--nodes", "-N")
    per_node = setting(stage, "--ntasks-per-node")
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", nodes)
    if match is None or not per_node.isdigit():
        raise UserError(
            f"{stage.name}: --nodes={nodes} --ntasks-per-node={per_node} are no numbers of nodes "
            "and ranks; write --nodes=4 or --nodes=2-4, and --ntasks-per-node=8"
        )
    fewest, most = int(match[1]), int(match[2] or match[1])
    return [count * int(per_node) for count in range(most, fewest - 1, -1)]


def setting(stage: Stage, *keys: str) -> str:
    """Return the value of an option of sbatch: given, or from the head of the stage's script."""
    for key in keys:
        if key in stage.options:
            return stage.options[key][-1]
    text = (LOCATION / f"{stage.name}.sh").read_text()
    found = re.search(rf"^#SBATCH .*{keys[0]}=(\S+)", text, re.MULTILINE)
    assert found, f"slurm/{stage.name}.sh says {keys[0]}"
    return found[1]


def shard_pairs(words: list[str]) -> list[tuple[str, str]]:
    """Return (input, output prefix) of each shard: one for each file of `input`, by its name.

    Raises:
        PipelineError: see `data_pipeline.tokenize`.
        UserError: two files would become one shard.
    """
    arguments = parse_arguments(Tokenize, words)
    if not (Path(arguments.tokenizer) / "tokenizer.json").is_file():
        raise UserError(
            f"tokenizer={arguments.tokenizer} has no tokenizer.json; make one with "
            "data_pipeline.train_tokenizer"
        )
    pairs: dict[str, str] = {}
    for found in find_inputs(arguments.input):
        output = f"{arguments.output}/{found.stem}"
        if output in pairs:
            raise UserError(
                f"input={arguments.input}: {found.path} and {pairs[output]} would both become "
                f"{output}; rename one, or tokenize them into two outputs"
            )
        pairs[output] = f"hf:{found.path}" if found.kind == "hf" else found.path
    return [(source, output) for output, source in pairs.items()]


def is_given(words: list[str], key: str) -> bool:
    """Return whether `key=` is among the words."""
    return any(word.startswith(f"{key}=") for word in words)


def is_within(path: Path, folder: str) -> bool:
    """Return whether a path is a folder or lies below it."""
    return path.resolve().is_relative_to(Path(folder).resolve())
