"""Writes a Hugging Face folder as a transaction: it appears whole, or not at all.

Everything goes to a sibling folder first, is read back and compared with the model, and is renamed
to its place last.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ring_train.config import Architecture, ModelConfig, Precision
from ring_train.hf.config import generation_config_dict, hf_config_dict, read_model_config
from ring_train.hf.errors import HfError
from ring_train.hf.family import FAMILIES, MODELING_DIR
from ring_train.hf.reader import open_hf_folder
from ring_train.hf.shards import INDEX_NAME, write_tensors
from ring_train.hf.table import Entry, make_table
from ring_train.hf.transaction import new_folder
from ring_train.plan import context_tokens

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
MAX_SHARD_BYTES = 4 * 2**30

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
OPTIONAL_TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
CHAT_TEMPLATE = "chat_template.jinja"

NOT_IN_FOLDER = frozenset(
    {
        "token_mixers",
        "channel_mixers",
        "moe_router_bias_update_rate",
        "moe_router_bias_zero_mean",
        "moe_z_loss_coeff",
        "moe_aux_loss_coeff",
        "megatron",
    }
)
"""Fields of ModelConfig that a folder has no key for: derived, or of the training recipe."""

LINEAR_FIELDS = frozenset({"group_norm_size", "decay_layer_rule", "linear_silu"})
"""Fields that a folder of a softmax family has no key for, because nothing depends on them."""


def write_hf_folder(
    output: str | Path,
    model: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    precision: Precision,
    tokenizer_dir: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the folder of a model; one process calls this.

    Args:
        output: must not exist, or be empty.
        model: goes to config.json.
        tensors: (trainer's name, whole tensor), each tensor of the table exactly once.
        precision: of the written weights; tensors that are fp32 by definition stay so.
        tokenizer_dir: holds tokenizer.json and tokenizer_config.json.
        max_shard_bytes: a shard is closed before it would exceed this.

    Raises:
        HfError: with nothing left behind and `output` as it was.
    """
    output = Path(output)
    config = hf_config_dict(model, precision=precision)
    with new_folder(output) as partial:
        _check_tokenizer(Path(tokenizer_dir), model)
        _write_shards(partial, make_table(model), tensors, DTYPES[precision], max_shard_bytes)
        write_json(partial / "config.json", config)
        write_json(partial / "generation_config.json", generation_config_dict(model))
        _copy_files(partial, Path(tokenizer_dir), model)
        _verify(partial, model)


def _check_tokenizer(folder: Path, model: ModelConfig) -> None:
    """Raise unless the folder holds a tokenizer whose ids the model has rows for."""
    missing = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if missing:
        raise HfError(f"tokenizer folder {folder} lacks {', '.join(missing)}; give a complete one")
    largest = max(Tokenizer.from_file(str(folder / TOKENIZER_FILES[0])).get_vocab().values())
    if largest >= model.vocab_size:
        raise HfError(
            f"{folder / TOKENIZER_FILES[0]} has token id {largest}, but model.vocab_size="
            f"{model.vocab_size}; export with the tokenizer of the training data"
        )


def _write_shards(
    folder: Path,
    table: dict[str, Entry],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Write safetensors files of bounded size and their index."""
    shards: list[list[str]] = []
    total_bytes = 0
    for part in _parts(_hf_tensors(table, tensors, dtype), max_shard_bytes):
        shards.append(list(part))
        total_bytes += sum(map(_num_bytes, part.values()))
        write_tensors(folder / f"{len(shards)}.part", part)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / shard)
        weight_map.update(dict.fromkeys(names, shard))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(folder / INDEX_NAME, index)


def _hf_tensors(
    table: dict[str, Entry], tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the folder; raise unless each entry of the table comes exactly once."""
    waiting = dict(table)
    for name, tensor in tensors:
        entry = waiting.pop(name, None)
        if entry is None:
            problem = "comes twice" if name in table else "is not in the table of its config"
            raise HfError(f"tensor {name} {problem}; the checkpoint is of another model")
        if tuple(tensor.shape) != entry.shape:
            raise HfError(
                f"tensor {name} has shape {list(tensor.shape)}, the config says "
                f"{list(entry.shape)}; the checkpoint is of another model"
            )
        stored_dtype = torch.float32 if entry.fp32 else dtype
        for hf_name, part in entry.to_hf(tensor.detach()).items():
            # A copy: safetensors refuses views that share storage.
            yield hf_name, part.to("cpu", stored_dtype, copy=True).contiguous()
    if waiting:
        raise HfError(
            f"{len(waiting)} tensors never came, first {next(iter(waiting))}; "
            "the checkpoint is of another model"
        )


def _parts(
    named_tensors: Iterable[tuple[str, Tensor]], max_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Yield consecutive tensors in groups of at most `max_bytes`, or one larger tensor alone."""
    part: dict[str, Tensor] = {}
    used_bytes = 0
    for name, tensor in named_tensors:
        if part and used_bytes + _num_bytes(tensor) > max_bytes:
            yield part
            part, used_bytes = {}, 0
        part[name] = tensor
        used_bytes += _num_bytes(tensor)
    yield part


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _copy_files(folder: Path, tokenizer_dir: Path, model: ModelConfig) -> None:
    """Copy the tokenizer, a chat template and the modeling files of the family."""
    for name in (*TOKENIZER_FILES, *OPTIONAL_TOKENIZER_FILES):
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, folder / name)
    tokenizer_config = json.loads((folder / TOKENIZER_FILES[1]).read_text(encoding="utf-8"))
    if "chat_template" not in tokenizer_config and not (folder / CHAT_TEMPLATE).exists():
        shutil.copyfile(MODELING_DIR / CHAT_TEMPLATE, folder / CHAT_TEMPLATE)
    for path in FAMILIES[model.architecture].modeling_files:
        shutil.copyfile(path, folder / path.name)


def _verify(folder: Path, model: ModelConfig) -> None:
    """Raise unless the written folder alone says what the model is and holds all of it.

    Equal fields mean equal decay slopes, which depend on nothing else.
    """
    written = read_model_config(folder)
    theirs = expressible_fields(written)
    for name, ours in expressible_fields(model).items():
        if theirs[name] != ours:
            raise HfError(
                f"model.{name}={ours!r} reads back as {theirs[name]!r} from the exported "
                "config.json; the format of the family cannot express it"
            )
    with open_hf_folder(folder, written):
        pass


def expressible_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields that the folder of a model must say.

    One router group counts as none, and a context that is not stretched needs no original one.
    """
    is_linear = model.architecture == Architecture.bailing_moe_linear_v2
    unsaid = NOT_IN_FOLDER | (frozenset() if is_linear else LINEAR_FIELDS)
    fields = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(ModelConfig)
        if field.name not in unsaid
    }
    if model.moe_router_num_groups == 1:
        fields |= {"moe_router_num_groups": None, "moe_router_group_topk": None}
    if model.rotary_scaling_factor == 1:
        fields["original_max_position_embeddings"] = None
    fields["max_position_embeddings"] = context_tokens(model, model.rotary_scaling_factor)
    return fields


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
