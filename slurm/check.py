"""Check jobs before they are submitted or their ranks start: `check.py HOW STAGE: WORD...`.

A stage is `data:`, `build_index:`, `pretrain:`, `sft:` or `export:`, followed by the words of its
command. Words that begin with `-` are options of sbatch, such as `--nodes=2`, one word each. HOW is

- `print`: the plan of one stage, as a person reads it;
- `job`: of one stage, in its job: ranks and run folder. `--world=N` are the numbers of ranks that
  the job could have, largest first; the first legal one is chosen;
- `shard`: of `data`, the input and output of `--task=I`;
- `chain`: of stages that follow one another: name, state, folder, and words to add, a line each.

Lines have tabs between their columns. Imports no torch, unless epochs of shards are counted. Exits
2, with one message, if something is wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages import Stage, is_given, is_within, read_stages, shard_pairs, world_sizes

from data_pipeline.config import PipelineError
from ring_train.config import Config, ModelConfig, compose
from ring_train.errors import UserError
from ring_train.jobs import dry_run
from ring_train.jobs.run_config import sft_config
from ring_train.plan import make_plan

TRAINING = ("pretrain", "sft")
USER_ERROR_STATUS = 2
FINISHED, WAITING = "finished", "to do"


@dataclasses.dataclass
class Known:
    """What the stages before will have made."""

    run_dir: str | None = None
    """Of the training before."""
    config: Config | None = None
    """Of the training before."""
    shards: list[str] = dataclasses.field(default_factory=list)
    """Prefixes."""
    is_new: bool = False
    """A stage before is still to do."""


def main(arguments: list[str]) -> int:
    """Check what the arguments say; return the exit status."""
    how, *rest = arguments
    commands = {"print": print_plan, "job": check_job, "shard": choose_shard, "chain": check_chain}
    try:
        commands[how](read_stages(rest))
    except (UserError, PipelineError) as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR_STATUS
    return 0


def print_plan(stages: list[Stage]) -> None:
    """Print the plan of one stage, or raise for all that is wrong with it."""
    [stage] = stages
    if stage.name in TRAINING:
        config = training_config(stage)
        check_shards(stage, config, Known())
        world = legal_world(stage, world_sizes(stage))
        sys.stdout.write(plan_text(stage, world))
        sys.stdout.write(f"run folder            {config.run_dir}\n")
        sys.stdout.write(f"checked for           {world} ranks\n")
    else:
        for line in chain_lines([stage]):
            sys.stdout.write("  ".join(part for part in line if part) + "\n")


def check_job(stages: list[Stage]) -> None:
    """Print ranks and run folder, or the output, of the stage that a job runs."""
    [stage] = stages
    if stage.name == "export":
        config = export_config(stage.words)
        sys.stdout.write(f"1\t{config.output}\n")
        return
    config = training_config(stage)
    check_shards(stage, config, Known())
    world = legal_world(stage, [int(size) for size in stage.options["--world"]])
    sys.stdout.write(f"{world}\t{config.run_dir}\n")


def choose_shard(stages: list[Stage]) -> None:
    """Print input and output prefix of the task of an array."""
    [stage] = stages
    shards = shard_pairs(stage.words)
    task = stage.options["--task"][0] or ("0" if len(shards) == 1 else "unset")
    if not task.isdigit() or int(task) >= len(shards):
        raise UserError(
            f"SLURM_ARRAY_TASK_ID={task}, but the input is {len(shards)} files; submit it with "
            f"--array=0-{len(shards) - 1}"
        )
    sys.stdout.write("\t".join(shards[int(task)]) + "\n")


def check_chain(stages: list[Stage]) -> None:
    """Print a line for each stage of a chain."""
    for line in chain_lines(stages):
        sys.stdout.write("\t".join(line) + "\n")


def chain_lines(stages: list[Stage]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (name, state, folder or array, word to add) of stages that follow one another."""
    known = Known()
    for stage in stages:
        if stage.name == "data":
            yield check_data(stage, known)
        elif stage.name == "export":
            yield check_export(stage, known)
        elif stage.name == "build_index":
            yield check_index(stage, stages, known)
        else:
            yield check_training(stage, known)


def check_data(stage: Stage, known: Known) -> tuple[str, str, str, str]:
    """Check a tokenization; its folder column is the array of its tasks."""
    shards = shard_pairs(stage.words)
    outputs = [output for _, output in shards]
    known.shards += outputs
    done = all(Path(f"{o}.idx").exists() and not Path(f"{o}.journal").exists() for o in outputs)
    known.is_new |= not done
    return ("data", FINISHED if done else WAITING, f"0-{len(shards) - 1}", "")


def check_index(stage: Stage, stages: list[Stage], known: Known) -> tuple[str, str, str, str]:
    """Check the index of the pretraining that follows; it takes its words."""
    if stage.words:
        raise UserError(
            f"build_index: {stage.words[0]} - it takes no words of its own; they are those of "
            "pretrain:"
        )
    following = [other for other in stages if other.name == "pretrain"]
    if not following:
        raise UserError("build_index: needs a stage pretrain:, whose words it takes")
    config = training_config(following[0])
    finished = is_finished(config) and not known.is_new
    return ("build_index", FINISHED if finished else WAITING, config.run_dir, "")


def check_training(stage: Stage, known: Known) -> tuple[str, str, str, str]:
    """Check a training run; an sft takes the weights of the training before unless told."""
    added = ""
    if stage.name == "sft" and known.run_dir and not is_given(stage.words, "init_from"):
        added = f"init_from={known.run_dir}"
        stage.words.append(added)
    config = training_config(stage, known)
    if known.run_dir and Path(known.run_dir).resolve() == Path(config.run_dir).resolve():
        raise UserError(
            f"{stage.name}: run_dir={config.run_dir} is that of the training before; give each its "
            "own"
        )
    check_shards(stage, config, known)
    legal_world(stage, world_sizes(stage), known, config)
    finished = is_finished(config) and not known.is_new
    known.is_new |= not finished
    known.run_dir, known.config = config.run_dir, config
    return (stage.name, FINISHED if finished else WAITING, config.run_dir, added)


def check_export(stage: Stage, known: Known) -> tuple[str, str, str, str]:
    """Check an export; it takes the training before unless told."""
    added = ""
    if known.run_dir and not is_given(stage.words, "checkpoint"):
        added = f"checkpoint={known.run_dir}"
        stage.words.append(added)
    config = export_config(stage.words, known)
    exists = (Path(config.output) / "config.json").exists()
    if exists and known.is_new:
        raise UserError(
            f"output={config.output} is there already, of an earlier training; choose another "
            "output, or move it away"
        )
    return ("export", FINISHED if exists else WAITING, config.output, added)


def export_config(words: list[str], known: Known | None = None) -> Any:
    """Return the config of an export whose checkpoint is there, or is made before."""
    config = compose("export", words)
    source = Path(config.checkpoint)
    made = known is not None and known.run_dir is not None and is_within(source, known.run_dir)
    if not source.is_dir() and not made:
        raise UserError(
            f"checkpoint={source} is no folder; name RUN_DIR or RUN_DIR/checkpoints/step_00000100"
        )
    return config


def training_config(stage: Stage, known: Known | None = None) -> Config:
    """Return the config of a training run, as its own command reads it."""
    if stage.name == "pretrain":
        return compose("pretrain", stage.words)
    before = known.config if known else None
    if before is None or not starts_from(stage.words, before.run_dir):
        return sft_config(stage.words)
    # The weights are still to be trained: their model and tokenizer are known from the plan.
    return compose_after(stage.words, before)


def compose_after(words: list[str], before: Config) -> Config:
    """Return a fine-tuning whose initial weights another run will have made."""
    model: ModelConfig | None = None if is_given(words, "model") else before.model
    config: Config = compose("sft", words, model)
    if config.data.tokenizer:
        return config
    data = dataclasses.replace(config.data, tokenizer=before.data.tokenizer)
    return dataclasses.replace(config, data=data)


def starts_from(words: list[str], run_dir: str) -> bool:
    """Return whether a run starts from another that has saved nothing yet."""
    given = [word.partition("=")[2] for word in words if word.startswith("init_from=")]
    has_saved = any(Path(run_dir).glob("checkpoints/step_*"))
    return bool(given) and is_within(Path(given[-1]), run_dir) and not has_saved


def check_shards(stage: Stage, config: Config, known: Known) -> None:
    """Raise unless every shard that a run reads is there or will be."""
    made = {Path(prefix).resolve() for prefix in known.shards}
    for name, domain in config.data.domains.items():
        for key in ("path", "valid_path"):
            prefix = getattr(domain, key)
            if prefix is None or Path(f"{prefix}.idx").exists() or Path(prefix).resolve() in made:
                continue
            raise UserError(
                f"{stage.name}: data.domains.{name}.{key}={prefix}: there is no {prefix}.idx, and "
                "no data: stage before makes it; tokenize it, or correct the path"
            )


def is_finished(config: Config) -> bool:
    """Return whether a run has done all its steps; a run in epochs, whatever they came to."""
    try:
        outcome = json.loads((Path(config.run_dir) / "outcome.json").read_text())
    except (OSError, ValueError):
        return False
    in_epochs = [config.train.num_epochs, *(p.num_epochs for p in config.phases.values())]
    same = any(in_epochs) or outcome.get("num_steps") == config.train.num_steps
    return outcome.get("state") == "finished" and same


def legal_world(
    stage: Stage,
    sizes: list[int],
    known: Known | None = None,
    config: Config | None = None,
) -> int:
    """Return the first size that the plan is legal on.

    Raises:
        UserError: there is none; the message is that for the first, which was asked for.
    """
    refused = []
    for size in sizes:
        try:
            if known is not None and config is not None and reads_what_is_not_there(stage, config):
                make_plan(any_length(config), size)
            else:
                plan_text(stage, size)
        except UserError as error:
            refused.append(str(error))
        else:
            return size
    raise UserError(f"{stage.name} on {sizes[0]} ranks: {refused[0]}")


def reads_what_is_not_there(stage: Stage, config: Config) -> bool:
    """Return whether dry_run would read weights or shards that earlier stages are to make."""
    shards = [domain.path for domain in config.data.domains.values()]
    weights = config.init_from
    missing = weights is not None and not Path(weights).exists()
    no_weights = weights is not None and starts_from(stage.words, weights)
    return missing or no_weights or not all(Path(f"{p}.idx").exists() for p in shards)


def any_length(config: Config) -> Config:
    """Return a config with some steps in place of epochs: how many, only its shards know."""
    train = config.train
    if train.num_epochs:
        train = dataclasses.replace(train, num_epochs=None, num_steps=train.num_steps or 1)
    phases = {
        name: dataclasses.replace(phase, num_epochs=None, num_steps=1)
        if phase.num_epochs
        else phase
        for name, phase in config.phases.items()
    }
    return dataclasses.replace(config, train=train, phases=phases)


def plan_text(stage: Stage, world_size: int) -> str:
    """Return what dry_run prints of a plan, or raise what it says against it."""
    out, problems = io.StringIO(), io.StringIO()
    with tempfile.NamedTemporaryFile() as file:
        words = [f"job={stage.name}", *stage.words, f"world_size={world_size}", f"json={file.name}"]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(problems):
            status = dry_run.main(words)
    if status:
        raise UserError(problems.getvalue().strip().removeprefix("error: "))
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
