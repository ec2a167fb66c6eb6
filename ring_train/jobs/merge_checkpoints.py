"""Merge checkpoints of a run: `python -m ring_train.jobs.merge_checkpoints run_dir=DIR output=DIR`.

`last=N` or `steps=[...]` chooses them, `curve=linear|cosine|one_minus_sqrt|constant` the
learning-rate decay that the average stands for. The output is a checkpoint without optimizer, for
`init_from`, `export`, `evaluate` and `validate`. `validation=FILE` compares its held-out losses
with those of the last checkpoint. One process, whatever layout saved them. See docs/merging.md.
"""

import sys
from pathlib import Path

from ring_train.config import Config, MergeCheckpointsConfig, compose, read_yaml
from ring_train.errors import UserError
from ring_train.jobs import validate
from ring_train.jobs.initial_model import read_initial_model
from ring_train.jobs.results import check_writable
from ring_train.runtime.errors import run_job


def main(overrides: list[str]) -> None:
    """Merge the checkpoints that the overrides name."""
    config: MergeCheckpointsConfig = compose("merge_checkpoints", overrides)
    if config.validation:
        check_writable("validation", config.validation)

    from ring_train.checkpoint.merging import (
        check_output,
        choose_checkpoints,
        open_merge,
        write_merge,
    )

    folders = choose_checkpoints(Path(config.run_dir), config.last, config.steps)
    check_output(Path(config.output), folders)
    merge = open_merge(folders, config.curve)
    check_same_positions(folders)
    write_merge(merge, Path(config.output))
    steps = [source.step for source in merge.sources]
    for step, weight in zip(steps, merge.weights, strict=True):
        sys.stdout.write(f"{weight:8.5f}  step {step}\n")
    note = rate_note(read_yaml(folders[-1] / "config.yaml"), steps)
    sys.stdout.write(f"{note}merged {len(steps)} checkpoints into {config.output}\n")
    if config.validation:
        weights = f"weights=[{config.output},{folders[-1]}]"
        validate.main([weights, f"output={config.validation}"])


def check_same_positions(folders: list[Path]) -> None:
    """Raise a UserError if phases of the run have changed the position embedding in between."""
    models = [read_initial_model(str(folder), None, "run_dir").model for folder in folders]
    for folder, model in zip(folders, models, strict=True):
        for key in ("rotary_base", "rotary_scaling_factor"):
            theirs, ours = getattr(model, key), getattr(models[-1], key)
            if theirs != ours:
                raise UserError(
                    f"{folder} was trained with model.{key}={theirs}, {folders[-1]} with {ours}: "
                    "their average would fit neither; merge checkpoints of one phase"
                )


def rate_note(config: Config, steps: list[int]) -> str:
    """Return a line if the learning rate was not constant while the checkpoints were saved."""
    from ring_train.train.schedule import learning_rate

    first, last = (
        learning_rate(config.optim, step, config.train.num_steps)
        for step in (steps[0], steps[-1] - 1)
    )
    if first == last:
        return ""
    return (
        f"note: the learning rate went from {first:g} to {last:g} between these checkpoints; the "
        "average decays it once more\n"
    )


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
