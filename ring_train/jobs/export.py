"""Turn a checkpoint into a Hugging Face folder: `python -m ring_train.jobs.export`.

`checkpoint=DIR output=DIR [precision=bf16|fp32]`. DIR is RUN_DIR/checkpoints/step_00000100 or a
run folder, which stands for its newest complete checkpoint. One process, whatever layout saved it.
"""

import dataclasses
import json
import sys
from pathlib import Path

from ring_train.config import (
    Architecture,
    Config,
    ExportConfig,
    ParallelConfig,
    Precision,
    compose,
    read_yaml,
)
from ring_train.errors import UserError
from ring_train.plan import Plan, make_plan, model_at
from ring_train.runtime.errors import run_job


def main(overrides: list[str]) -> None:
    """Export the checkpoint that the overrides name."""
    config: ExportConfig = compose("export", overrides)

    from ring_train.checkpoint import find_checkpoint

    folder = find_checkpoint(Path(config.checkpoint), "checkpoint")
    plan = export_plan(folder, config)
    export(plan, folder, config)


def export_plan(folder: Path, config: ExportConfig) -> Plan:
    """Return the plan that holds the model of a checkpoint whole, in fp32, on one rank.

    Raises:
        UserError: the checkpoint's config names no tokenizer, or contradicts `decay_layer_rule`.
    """
    saved: Config = read_yaml(folder / "config.yaml")
    if not saved.data.tokenizer:
        raise UserError(
            f"{folder}/config.yaml: data.tokenizer is empty, and an export holds its tokenizer; "
            "write the tokenizer's folder there"
        )
    from ring_train.checkpoint.manifest import STATE_FILE

    _check_decay_rule(folder, saved, config)
    train = dataclasses.replace(saved.train, precision=Precision.fp32)
    whole = dataclasses.replace(saved, train=train, parallel=ParallelConfig())
    step = json.loads((folder / STATE_FILE).read_text())["step"]
    plan = make_plan(whole, 1)
    return dataclasses.replace(plan, config=dataclasses.replace(whole, model=model_at(plan, step)))


def _check_decay_rule(folder: Path, saved: Config, config: ExportConfig) -> None:
    """Raise unless a given rule is the one that the weights were trained with."""
    model, given = saved.model, config.decay_layer_rule
    if given is None:
        return
    if model.architecture is not Architecture.bailing_moe_linear_v2:
        raise UserError(
            f"decay_layer_rule={given} was given, but {folder} holds model.architecture="
            f"{model.architecture}, which has no linear layers; leave decay_layer_rule out"
        )
    if given != model.decay_layer_rule:
        raise UserError(
            f"decay_layer_rule={given} was given, but {folder} was trained with "
            f"model.decay_layer_rule={model.decay_layer_rule}; leave decay_layer_rule out"
        )


def export(plan: Plan, folder: Path, config: ExportConfig) -> None:
    """Load the checkpoint and write the folder, which appears whole or not at all."""
    import ring_train.platform  # noqa: F401  (before the first import of megatron.core)
    from ring_train.checkpoint import load_weights
    from ring_train.hf.writer import write_hf_folder
    from ring_train.model.build import build_model
    from ring_train.model.tensors import local_tensors
    from ring_train.runtime.distributed import start_runtime

    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        load_weights(folder, model, plan, groups.collection)
        write_hf_folder(
            config.output,
            plan.config.model,
            ((item.name, item.tensor) for item in local_tensors(model)),
            precision=config.precision,
            tokenizer_dir=plan.config.data.tokenizer,
        )
    sys.stdout.write(f"exported {folder} to {config.output}\n")


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
