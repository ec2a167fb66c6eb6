"""Turn a checkpoint into a Hugging Face folder: `python -m ring_train.jobs.export`.

`checkpoint=DIR output=DIR [precision=bf16|fp32|fp8] [mtp=layer|separate|none]
[adapter=merged|separate]`. DIR is RUN_DIR/checkpoints/step_00000100 or a run folder, which stands
for its newest complete checkpoint. One process or several under torchrun, whatever layout saved it;
tensors are streamed, so that memory does not depend on the size of the model.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ring_train.config import (
    AdapterExport,
    Architecture,
    Config,
    ExportConfig,
    ModelConfig,
    ParallelConfig,
    Precision,
    WeightFormat,
    compose,
    read_yaml,
)
from ring_train.errors import UserError
from ring_train.jobs.output_place import check_output_place
from ring_train.plan import Plan, make_plan, model_at
from ring_train.runtime.errors import run_job

if TYPE_CHECKING:
    from ring_train.checkpoint.manifest import Manifest
    from ring_train.checkpoint.weights import CheckpointWeights
    from ring_train.runtime.ranks import Ranks


def main(overrides: list[str]) -> None:
    """Export the checkpoint that the overrides name."""
    config: ExportConfig = compose("export", overrides)

    from ring_train.checkpoint import find_checkpoint

    folder = find_checkpoint(Path(config.checkpoint), "checkpoint")
    check_output_place(config.output)
    plan = export_plan(folder, config)
    export(plan, folder, config)


def export_plan(folder: Path, config: ExportConfig) -> Plan:
    """Return the plan that a checkpoint's model has on one rank.

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


def check_adapter_keys(plan: Plan, folder: Path, config: ExportConfig) -> None:
    """Raise a UserError for keys of adapters that this checkpoint or export does not have."""
    if config.adapter is not None and plan.lora is None:
        raise UserError(
            f"adapter={config.adapter} was given, but {folder} was trained without adapters "
            "(lora.rank=null); leave adapter out"
        )
    separate = config.adapter is AdapterExport.separate
    if separate and config.precision is WeightFormat.fp8:
        raise UserError(
            "precision=fp8 is for whole models, but adapter=separate writes adapters alone; "
            "choose precision=bf16 or adapter=merged"
        )
    if config.base_model is not None and not separate:
        raise UserError(
            f"base_model={config.base_model} is written into separate adapters only; "
            "add adapter=separate or leave base_model out"
        )
    base = config.base_model or plan.config.init_from
    if separate and not (Path(str(base)) / "config.json").is_file():
        key = "init_from" if config.base_model is None else "base_model"
        raise UserError(
            f"{key}={base} is no Hugging Face folder, and separate adapters name that of the "
            "weights beside which they were trained; export these and give base_model=FOLDER"
        )


def export(plan: Plan, folder: Path, config: ExportConfig) -> None:
    """Write the folder of a checkpoint, which appears whole or not at all.

    Collective over torchrun's ranks, which share hashing, reading and writing.
    """
    from ring_train.checkpoint.reading import check_hashes
    from ring_train.checkpoint.weights import open_weights
    from ring_train.runtime.ranks import start_ranks

    check_adapter_keys(plan, folder, config)
    with start_ranks() as ranks:

        def check_share(path: Path, manifest: Manifest) -> None:
            check_hashes(path, manifest, ranks.rank, ranks.world_size)

        weights = ranks.agree(lambda: open_weights(folder, check=check_share))
        if config.adapter is AdapterExport.separate:
            ranks.from_first(lambda: write_separate(plan, weights, config))
        else:
            write_merged(plan, weights, config, ranks)
        if ranks.rank == 0:
            sys.stdout.write(f"exported {folder} to {config.output}\n")


def write_merged(
    plan: Plan, weights: CheckpointWeights, config: ExportConfig, ranks: Ranks
) -> None:
    """Write the weights, adapters added to them if there are any."""
    from ring_train.hf.adapters import adapted_names, read_merged
    from ring_train.hf.table import check_names
    from ring_train.hf.writer import HfFormat, write_hf_folder

    names, adapted = adapted_names(weights.names)
    check_names(plan.config.model, names)
    scale = 0.0 if plan.lora is None else plan.lora.scale
    write_hf_folder(
        config.output,
        plan.config.model,
        lambda name: read_merged(name, weights.read, adapted, scale),
        form=HfFormat(
            weights=config.precision, mtp=config.mtp, max_shard_bytes=config.max_shard_bytes
        ),
        tokenizer_dir=plan.config.data.tokenizer,
        ranks=ranks,
    )


def write_separate(plan: Plan, weights: CheckpointWeights, config: ExportConfig) -> None:
    """Write the adapters alone, after a look at the weights that they belong to."""
    from ring_train.hf.adapters import adapted_names, read_adapter
    from ring_train.hf.config import read_model_config
    from ring_train.hf.parts import DTYPES
    from ring_train.hf.peft import check_base_weights, write_peft_folder
    from ring_train.jobs.initial_weights import check_same_folder_model

    saved: Config = read_yaml(weights.folder / "config.yaml")
    names, adapted = adapted_names(weights.names)
    base = str(config.base_model or saved.init_from)
    model = read_model_config(base, saved.decay_layer_rule)
    check_same_folder_model(Path(base), model, saved.model, key="base_model")
    check_same_positions(Path(base), model, plan.config.model)
    dtype = DTYPES[WeightFormat(saved.train.precision.value)]
    check_base_weights(Path(base), model, names, weights.read, dtype)
    write_peft_folder(
        config.output,
        saved.model,
        saved.lora,
        {name: read_adapter(name, weights.read) for name in adapted},
        precision=config.precision,
        base_model=base,
    )


POSITION_KEYS = ("rotary_base", "rotary_scaling_factor", "original_max_position_embeddings")
"""Keys that a stage of training may change and that config.json beside the weights says."""


def check_same_positions(folder: Path, base: ModelConfig, trained: ModelConfig) -> None:
    """Raise a UserError if adapters were trained with another position embedding than the base."""
    from ring_train.hf.config import expressible_fields

    theirs, ours = expressible_fields(base), expressible_fields(trained)
    differing = [
        f"model.{key}={ours[key]} (folder: {theirs[key]})"
        for key in POSITION_KEYS
        if ours[key] != theirs[key]
    ]
    if differing:
        raise UserError(
            f"base_model={folder} has another position embedding than the adapters were trained "
            f"with: {'; '.join(differing)}; adapters cannot say that: use adapter=merged"
        )


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
