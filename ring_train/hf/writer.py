"""Writes a Hugging Face folder as a transaction: it appears whole, or not at all.

Everything goes to a sibling folder first and is renamed to its place last. Tensors are read,
converted and written one by one, each file by one rank, so that memory is that of a few tensors.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from ring_train.config import ModelConfig, MtpExport, WeightFormat
from ring_train.hf.config import (
    expressible_fields,
    generation_config_dict,
    hf_config_dict,
    read_model_config,
)
from ring_train.hf.errors import HfError
from ring_train.hf.family import FAMILIES, MODELING_DIR
from ring_train.hf.mtp import MTP_FOLDER, mtp_config, mtp_table, trunk_table
from ring_train.hf.parts import Part, PartReader, folder_parts, make_shards
from ring_train.hf.reader import open_hf_folder
from ring_train.hf.shards import INDEX_NAME
from ring_train.hf.table import Entry, make_table
from ring_train.hf.training_turns import end_of_turn
from ring_train.hf.transaction import write_folder
from ring_train.runtime.ranks import ALONE, Ranks
from ring_train.storage.files import write_synced
from ring_train.storage.safetensors import safetensors_chunks

MAX_SHARD_BYTES = 4 * 2**30

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
OPTIONAL_TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, kw_only=True)
class HfFormat:
    """What a person may choose of a folder."""

    weights: WeightFormat
    mtp: MtpExport = MtpExport.layer
    max_shard_bytes: int = MAX_SHARD_BYTES
    """A file is closed before its tensors would exceed this."""


def write_hf_folder(
    output: str | Path,
    model: ModelConfig,
    read: Callable[[str], Tensor],
    *,
    form: HfFormat,
    tokenizer_dir: str | Path,
    ranks: Ranks = ALONE,
) -> None:
    """Write the folder of a model. Collective over the ranks, which share its files.

    Args:
        output: must not exist, or be empty.
        model: goes to config.json.
        read: returns a whole tensor by the trainer's name; asked for those of `make_table`, in
            the order of the folder.
        form: dtype, place of the MTP layers, size of files.
        tokenizer_dir: holds tokenizer.json and tokenizer_config.json.
        ranks: who writes.

    Raises:
        UserError: with nothing left behind and `output` as it was.
    """
    if form.max_shard_bytes < 1:
        raise HfError(
            f"max_shard_bytes={form.max_shard_bytes}, but a file holds at least one byte; leave it "
            f"out for {MAX_SHARD_BYTES}"
        )
    if form.mtp is MtpExport.none:
        model = dataclasses.replace(model, mtp_num_layers=0)
    configs = folder_configs(model, form)
    _check_tokenizer(Path(tokenizer_dir), model)
    plans = _plans(model, form)

    def fill(partial: Path) -> None:
        for name, shards in plans.items():
            folder = partial / name
            folder.mkdir(exist_ok=True)
            _write_shards(folder, shards, read, ranks)

    def finish(partial: Path) -> None:
        for name, shards in plans.items():
            _write_index(partial / name, shards)
            _write_texts(partial / name, model, configs[name], Path(tokenizer_dir))
        _verify(partial, model)

    parts = [part for shards in plans.values() for shard in shards.values() for part in shard]
    needed_bytes = sum(part.described.num_bytes for part in parts)
    write_folder(Path(output), fill, finish, ranks=ranks, needed_bytes=needed_bytes)


def folder_configs(model: ModelConfig, form: HfFormat) -> dict[str, dict[str, Any]]:
    """Return `config.json` of each folder, as `_plans` names them."""
    whole = hf_config_dict(model, weights=form.weights)
    trunk = hf_config_dict(dataclasses.replace(model, mtp_num_layers=0), weights=form.weights)
    if _has_separate_mtp(model, form):
        return {"": trunk, MTP_FOLDER: mtp_config(whole)}
    return {"": whole}


def _has_separate_mtp(model: ModelConfig, form: HfFormat) -> bool:
    return form.mtp is MtpExport.separate and model.mtp_num_layers > 0


def _plans(model: ModelConfig, form: HfFormat) -> dict[str, dict[str, list[Part]]]:
    """Return the files of the folder, and of the folder of MTP layers where there is one."""
    table = make_table(model)
    tables: dict[str, dict[str, Entry]] = {"": table}
    if _has_separate_mtp(model, form):
        tables = {"": trunk_table(table), MTP_FOLDER: mtp_table(table, model.num_layers)}
    return {
        name: make_shards(folder_parts(part, form.weights), form.max_shard_bytes)
        for name, part in tables.items()
    }


def _check_tokenizer(folder: Path, model: ModelConfig) -> None:
    """Raise unless the folder holds a tokenizer whose ids the model has rows for."""
    missing = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if missing:
        raise HfError(f"tokenizer folder {folder} lacks {', '.join(missing)}; give a complete one")
    if not isinstance(_tokenizer_config(folder), dict):
        raise HfError(f"{folder / TOKENIZER_FILES[1]} holds no object; give a complete tokenizer")
    try:
        vocabulary = Tokenizer.from_file(str(folder / TOKENIZER_FILES[0])).get_vocab()
    except Exception as error:  # the library raises no narrower class
        raise HfError(
            f"{folder / TOKENIZER_FILES[0]} is no tokenizer ({error}); give a complete one"
        ) from None
    largest = max(vocabulary.values())
    if largest >= model.vocab_size:
        raise HfError(
            f"{folder / TOKENIZER_FILES[0]} has token id {largest}, but model.vocab_size="
            f"{model.vocab_size}; export with the tokenizer of the training data"
        )


def _tokenizer_config(folder: Path) -> Any:
    path = folder / TOKENIZER_FILES[1]
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HfError(f"{path} is not JSON ({error}); give a complete tokenizer") from None


def _write_shards(
    folder: Path, shards: dict[str, list[Part]], read: Callable[[str], Tensor], ranks: Ranks
) -> None:
    """Write this rank's share of the files."""
    for number, (name, parts) in enumerate(shards.items()):
        if number % ranks.world_size == ranks.rank:
            described = [part.described for part in parts]
            chunks = safetensors_chunks(described, PartReader(parts, read), {"format": "pt"})
            write_synced(folder / name, chunks)


def _write_index(folder: Path, shards: dict[str, list[Part]]) -> None:
    """Write which file holds which tensor, unless there is one file."""
    if len(shards) == 1:
        return
    placed = [(name, part.described) for name, parts in shards.items() for part in parts]
    index = {
        "metadata": {"total_size": sum(described.num_bytes for _, described in placed)},
        "weight_map": {described.name: name for name, described in placed},
    }
    write_json(folder / INDEX_NAME, index)


def _write_texts(
    folder: Path, model: ModelConfig, config: dict[str, Any], tokenizer_dir: Path
) -> None:
    """Write everything but weights."""
    write_json(folder / "config.json", config)
    _copy_files(folder, tokenizer_dir, model)
    stop = end_of_turn(folder, model.eos_token_id)
    write_json(folder / "generation_config.json", generation_config_dict(model, stop))


def _copy_files(folder: Path, tokenizer_dir: Path, model: ModelConfig) -> None:
    """Copy the tokenizer, a chat template and the modeling files of the family."""
    for name in (*TOKENIZER_FILES, *OPTIONAL_TOKENIZER_FILES):
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, folder / name)
    if "chat_template" not in _tokenizer_config(folder) and not (folder / CHAT_TEMPLATE).exists():
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


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
