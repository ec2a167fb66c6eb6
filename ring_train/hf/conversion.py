"""A Hugging Face folder made into one of another layer pattern or vocabulary, tensor by tensor.

What a conversion does not concern keeps its bytes: norms, output projections, MLPs, experts, router
and expert biases, MTP layers. Block-FP8 weights keep what they stand for (see docs/conversions.md).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ring_train.config import (
    Architecture,
    ConvertConfig,
    DecayLayerRule,
    ModelConfig,
    WeightFormat,
)
from ring_train.hf.config import read_json, read_model_config
from ring_train.hf.errors import HfError
from ring_train.hf.family import family_of
from ring_train.hf.fp8 import FP8_NAME
from ring_train.hf.layer_pattern import layer_pattern_problems, with_layer_pattern
from ring_train.hf.mtp import mtp_place
from ring_train.hf.reader import make_folder_table, open_hf_folder
from ring_train.hf.shards import read_model_files
from ring_train.hf.vocabulary import VocabularyChange, make_vocabulary_change, with_vocabulary
from ring_train.hf.writer import HfFormat, write_hf_folder
from ring_train.plan.layers import token_mixers
from ring_train.runtime.ranks import ALONE, Ranks

PRECISIONS = {"F32": WeightFormat.fp32, "BF16": WeightFormat.bf16}
"""By the words of the safetensors format."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a folder holds and what it becomes."""

    source: ModelConfig
    target: ModelConfig
    vocabulary: VocabularyChange
    precision: WeightFormat
    tokenizer: Path

    def summary(self) -> str:
        """Return in words what changes."""
        pairs = list(zip(token_mixers(self.source), token_mixers(self.target), strict=True))
        changes = []
        for before, after in (("gqa", "lightning"), ("lightning", "gqa")):
            layers = [str(i) for i, pair in enumerate(pairs) if pair == (before, after)]
            if layers:
                changes.append(f"layers {' '.join(layers)} from {before} to {after}")
        if self.vocabulary.is_any:
            change = self.vocabulary
            changes.append(
                f"{change.old_rows} rows for {change.old_ids} ids to {change.new_rows} rows for "
                f"{change.new_ids} ids"
            )
        return ", ".join(changes)


def make_conversion(config: ConvertConfig) -> Conversion:
    """Return what a conversion does; nothing is written.

    Raises:
        HfError: the folder cannot be converted so, or there is nothing to change.
    """
    folder = Path(config.hf_dir)
    source = _source_model(folder, config)
    target = _target_model(source, config)
    tokenizer = Path(config.tokenizer or folder)
    vocabulary = make_vocabulary_change(source, target.vocab_size, folder, tokenizer)
    if target == source and not vocabulary.is_any:
        raise HfError(
            f"hf_dir={folder} is already what is asked for; give layer_group_size, vocab_size, "
            "vocab_multiple or a tokenizer with more ids"
        )
    return Conversion(
        source=source,
        target=target,
        vocabulary=vocabulary,
        precision=config.precision or _stored_precision(folder, source),
        tokenizer=tokenizer,
    )


def convert_folder(conversion: Conversion, config: ConvertConfig, ranks: Ranks = ALONE) -> None:
    """Write the converted folder; it appears whole or not at all. Collective over the ranks.

    Raises:
        UserError: see `open_hf_folder` and `write_hf_folder`.
    """
    with open_hf_folder(config.hf_dir, conversion.source) as reader:
        read = with_layer_pattern(
            reader.read_logical,
            conversion.source,
            conversion.target,
            gates=config.new_gates,
            seed=config.seed,
        )
        read = with_vocabulary(
            read, conversion.vocabulary, new_rows=config.new_rows, seed=config.seed
        )
        write_hf_folder(
            config.output,
            conversion.target,
            read,
            form=HfFormat(weights=conversion.precision, mtp=mtp_place(Path(config.hf_dir))),
            tokenizer_dir=conversion.tokenizer,
            ranks=ranks,
        )


def _source_model(folder: Path, config: ConvertConfig) -> ModelConfig:
    """Return the model of the folder; a rule is for it only if it has lightning layers."""
    path = folder / "config.json"
    family = family_of(path, read_json(path))
    is_linear = family is Architecture.bailing_moe_linear_v2
    return read_model_config(folder, config.decay_layer_rule if is_linear else None)


def _target_model(source: ModelConfig, config: ConvertConfig) -> ModelConfig:
    """Return the model after the conversion, or raise HfError with all that is wrong."""
    before = source.layer_group_size
    group = before if config.layer_group_size is None else config.layer_group_size
    problems = layer_pattern_problems(source, group) + _norm_problems(source, config, group)
    if config.vocab_multiple < 1 or (config.vocab_size is not None and config.vocab_size < 1):
        problems.append(
            f"vocab_size={config.vocab_size} and vocab_multiple={config.vocab_multiple} must be at "
            "least 1; give numbers of rows"
        )
    if group == before == 1 and config.decay_layer_rule:
        problems.append(
            f"decay_layer_rule={config.decay_layer_rule} was given, but there will be no lightning "
            "layers; leave it out or give layer_group_size"
        )
    if problems:
        raise HfError(f"hf_dir={config.hf_dir}: " + "; ".join(problems))
    multiple = config.vocab_multiple
    rows = -(-(config.vocab_size or source.vocab_size) // multiple) * multiple
    fields = _lightning_fields(source, config, group)
    return dataclasses.replace(source, layer_group_size=group, vocab_size=rows, **fields)


def _lightning_fields(source: ModelConfig, config: ConvertConfig, group: int) -> dict[str, Any]:
    """Return what besides the pattern depends on whether there are lightning layers."""
    before = source.layer_group_size
    if (group == 1) == (before == 1):
        return {}
    if group == 1:
        return {
            "architecture": Architecture.bailing_moe_v2,
            "group_norm_size": 1,
            "decay_layer_rule": DecayLayerRule.zero_based,
        }
    return {
        "architecture": Architecture.bailing_moe_linear_v2,
        "group_norm_size": config.group_norm_size,
        "decay_layer_rule": config.decay_layer_rule or DecayLayerRule.zero_based,
    }


def _norm_problems(source: ModelConfig, config: ConvertConfig, group: int) -> list[str]:
    """Return why `group_norm_size` does not fit."""
    given, heads = config.group_norm_size, source.num_attention_heads
    if group == 1:
        if given is None:
            return []
        return [f"group_norm_size={given}, but all layers will be softmax; leave it out"]
    if source.layer_group_size > 1:
        if given in (None, source.group_norm_size):
            return []
        return [
            f"group_norm_size={given}, but lightning layers of the folder were trained with "
            f"{source.group_norm_size}; leave it out"
        ]
    if given is None or given < 1 or heads % given:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        return [
            f"group_norm_size={given} does not divide num_attention_heads={heads}, and new "
            f"lightning layers need it; choose from {divisors}"
        ]
    return []


def _stored_precision(folder: Path, model: ModelConfig) -> WeightFormat:
    """Return the dtype that all weights of a folder have."""
    stored = read_model_files(folder, model.num_layers)
    table = make_folder_table(folder, model, stored).values()
    names = [name for entry in table if not entry.fp32 for name in entry.hf if name in stored]
    dtypes = {stored[name].dtype for name in names}
    if FP8_NAME in dtypes:
        return WeightFormat.fp8
    if len(dtypes) == 1 and dtypes <= PRECISIONS.keys():
        return PRECISIONS[dtypes.pop()]
    raise HfError(
        f"hf_dir={folder} holds weights of {', '.join(sorted(dtypes)) or 'no'} dtype; say "
        f"in which of {', '.join(PRECISIONS.values())} to write them: precision=..."
    )
