"""Which tensors the safetensors files of a folder hold, known from their headers alone."""

import json
from pathlib import Path

from ring_train.hf.errors import HfError
from ring_train.hf.mtp import MTP_FOLDER, moved
from ring_train.hf.parts import SINGLE_NAME
from ring_train.storage.errors import StorageError
from ring_train.storage.safetensors import MALFORMED, Stored, read_header

INDEX_NAME = "model.safetensors.index.json"


def read_model_files(folder: Path, num_layers: int) -> dict[str, Stored]:
    """Return every tensor of a model by name, MTP layers of a folder of their own included.

    Args:
        folder: of the model.
        num_layers: of its trunk, behind which MTP layers are counted.

    Raises:
        HfError: see `read_stored`; or MTP layers lie in both places.
    """
    stored = read_stored(folder)
    if not (folder / MTP_FOLDER / "config.json").is_file():
        return stored
    separate = {moved(k, num_layers): v for k, v in read_stored(folder / MTP_FOLDER).items()}
    twice = sorted(stored.keys() & separate.keys())
    if twice:
        raise HfError(
            f"{folder} holds {twice[0]}, and {folder / MTP_FOLDER} holds it too; remove one of them"
        )
    return stored | separate


def read_stored(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a folder by name, after comparing index, headers and file sizes.

    Raises:
        HfError: no weights, a shard missing, truncated or outside the folder, or an index that
            names tensors which no shard holds, or leaves some out.
    """
    index_path, single_path = folder / INDEX_NAME, folder / SINGLE_NAME
    if index_path.exists() and single_path.exists():
        raise HfError(f"{folder} holds both {INDEX_NAME} and {SINGLE_NAME}; remove the stale one")
    if not index_path.exists():
        if not single_path.exists():
            raise HfError(f"{folder} holds neither {INDEX_NAME} nor {SINGLE_NAME}; export again")
        return _header(single_path)
    weight_map = _read_weight_map(index_path)
    stored: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        for tensor, entry in _header(folder / name).items():
            if weight_map.get(tensor) != name:
                raise HfError(
                    f"{folder / name} holds {tensor}, but {index_path} says "
                    f"{weight_map.get(tensor)!r}; index and shards are of different exports"
                )
            stored[tensor] = entry
    absent = sorted(weight_map.keys() - stored.keys())
    if absent:
        raise HfError(
            f"{index_path} names {len(absent)} tensors that no shard holds, first {absent[0]}; "
            "index and shards are of different exports"
        )
    return stored


def _read_weight_map(path: Path) -> dict[str, str]:
    """Return tensor -> file name of an index, refusing names that leave the folder."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, *MALFORMED) as error:
        raise HfError(f"{path} is not a safetensors index ({error!r}); copy it again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise HfError(f"{path}: weight_map is empty or not an object; copy the folder again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or Path(name).name != name or name == "..":
            raise HfError(f"{path} puts {tensor} in {name!r}; shards lie in the folder itself")
    return weight_map


def _header(path: Path) -> dict[str, Stored]:
    try:
        return read_header(path)
    except StorageError as error:
        raise HfError(str(error)) from error
