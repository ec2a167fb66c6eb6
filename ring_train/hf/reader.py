"""The tensors of a Hugging Face folder under the trainer's names, read one at a time.

Everything about the folder is checked against the table of the model before a tensor is read, so a
job with a wrong folder stops before it has spent time or memory. Safetensors only; no pickle.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ring_train.config import ModelConfig
from ring_train.hf.errors import HfError
from ring_train.hf.fp8 import FP8_NAME, SCALE_SUFFIX, dequantize, scale_shape
from ring_train.hf.parts import check_finite
from ring_train.hf.shards import read_model_files
from ring_train.hf.table import Entry, make_table
from ring_train.storage.errors import StorageError
from ring_train.storage.safetensors import Stored, read_tensor

DTYPES = ("F32", "BF16", "F16")
NUM_NAMED = 5
"""Tensors named in an error; the others are counted."""


class HfReader:
    """A folder that was found right; see `open_hf_folder`."""

    def __init__(self, table: dict[str, Entry], stored: dict[str, Stored]) -> None:
        """Remember the checked content of a folder."""
        self.table = table
        """Entries by the trainer's names."""
        self._stored = stored

    def read_logical(self, name: str) -> Tensor:
        """Return one tensor by the trainer's name, on the CPU, whole, in the dtype of the file.

        Tensors that are fp32 by definition come as fp32, and block-FP8 ones as the fp32 values
        that they stand for.

        Raises:
            HfError: the file cannot be read, or the tensor holds NaN or infinity.
        """
        entry = self.table[name]
        tensor = entry.from_hf({hf_name: self._read(hf_name) for hf_name in entry.hf})
        return tensor.float() if entry.fp32 else tensor

    def _read(self, hf_name: str) -> Tensor:
        stored = self._stored[hf_name]
        try:
            tensor = read_tensor(stored)
            if stored.dtype == FP8_NAME:
                tensor = dequantize(tensor, read_tensor(self._stored[hf_name + SCALE_SUFFIX]))
        except (StorageError, OSError) as error:
            raise HfError(f"{stored.shard} cannot be read ({error}); copy it again") from error
        check_finite(f"{hf_name} of {stored.shard}", tensor)
        return tensor


@contextmanager
def open_hf_folder(folder: str | Path, model: ModelConfig) -> Iterator[HfReader]:
    """Check a folder against a model and yield its reader.

    Args:
        folder: Hugging Face folder.
        model: what `read_model_config` said about it.

    Raises:
        HfError: a tensor is missing, extra, misshapen or of a dtype that is not read; or see
            `make_folder_table` and `read_stored`.
    """
    stored = read_model_files(Path(folder), model.num_layers)
    table = make_folder_table(folder, model, stored)
    problems = table_problems(table, stored)
    if problems:
        raise HfError(
            f"{folder} does not hold the model of its config.json: {'; '.join(problems)}; "
            "export it again or correct config.json"
        )
    yield HfReader(table, stored)


def make_folder_table(
    folder: str | Path, model: ModelConfig, stored: dict[str, Stored]
) -> dict[str, Entry]:
    """Return the table of a model, unless its folder is by far too small for it.

    A table is as large as its model, whatever the folder holds.

    Raises:
        HfError: there are fewer tensors than layers and experts, or a size is larger than any
            tensor.
    """
    layers, experts = model.num_layers + model.mtp_num_layers, model.num_moe_experts or 0
    tensors = layers + max(0, layers - model.first_k_dense_replace) * experts
    widest = max((size for tensor in stored.values() for size in tensor.shape), default=0)
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
    }
    problems = [f"{key}={n}, but no tensor is so wide" for key, n in sizes.items() if n > widest]
    if tensors > len(stored):
        problems.append(
            f"num_hidden_layers={model.num_layers}, num_nextn_predict_layers="
            f"{model.mtp_num_layers} and num_experts={experts} need more than {tensors} tensors, "
            f"but there are {len(stored)}"
        )
    if problems:
        raise HfError(
            f"{folder} does not hold the model of its config.json: {'; '.join(problems)}; export "
            "it again or correct config.json"
        )
    return make_table(model)


def table_problems(table: dict[str, Entry], stored: dict[str, Stored]) -> list[str]:
    """Return in what the stored tensors differ from a table, a line for each kind of difference."""
    shapes, dtypes = _expected(table, stored)
    present = stored.keys() & shapes.keys()
    kinds = {
        "missing": shapes.keys() - stored.keys(),
        "extra": stored.keys() - shapes.keys(),
        "misshapen": {name for name in present if stored[name].shape != shapes[name]},
        "of unread dtype": {name for name in present if stored[name].dtype not in dtypes[name]},
    }
    notes = {
        "misshapen": lambda name: f" {list(stored[name].shape)} not {list(shapes[name])}",
        "of unread dtype": lambda name: f" {stored[name].dtype}",
    }
    problems = []
    for kind, names in kinds.items():
        if names:
            note = notes.get(kind, lambda name: "")
            named = ", ".join(f"{name}{note(name)}" for name in sorted(names)[:NUM_NAMED])
            more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
            problems.append(f"{len(names)} tensors {kind}: {named}{more}")
    return problems


def _expected(
    table: dict[str, Entry], stored: dict[str, Stored]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str, ...]]]:
    """Return shapes and possible dtypes of all tensors; FP8 ones have scales beside them."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, tuple[str, ...]] = {}
    for entry in table.values():
        for name, shape in zip(entry.hf, entry.hf_shapes, strict=True):
            shapes[name] = shape
            dtypes[name] = DTYPES if entry.fp8 is None else (*DTYPES, FP8_NAME)
            if entry.fp8 and name in stored and stored[name].dtype == FP8_NAME:
                shapes[name + SCALE_SUFFIX] = scale_shape(shape)
                dtypes[name + SCALE_SUFFIX] = ("F32",)
    return shapes, dtypes
