"""The tensors of a Hugging Face folder under the trainer's names, read one at a time.

Everything about the folder is checked against the table of the model before a tensor is read, so a
job with a wrong folder stops before it has spent time or memory. Safetensors only; no pickle.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ring_train.config import ModelConfig
from ring_train.hf.errors import HfError
from ring_train.hf.shards import Stored, read_stored
from ring_train.hf.table import Entry, make_table

DTYPES = ("F32", "BF16", "F16")
NUM_NAMED = 5
"""Tensors named in an error; the others are counted."""


class HfReader:
    """An open folder; see `open_hf_folder`."""

    def __init__(
        self, table: dict[str, Entry], stored: dict[str, Stored], files: ExitStack
    ) -> None:
        """Remember the checked content of a folder."""
        self.table = table
        """Entries by the trainer's names."""
        self._stored = stored
        self._files = files
        self._open: dict[Path, Any] = {}

    def read_logical(self, name: str) -> Tensor:
        """Return one tensor by the trainer's name, on the CPU, whole, in the dtype of the file.

        Tensors that are fp32 by definition come as fp32.
        """
        entry = self.table[name]
        tensor = entry.from_hf({hf_name: self._read(hf_name) for hf_name in entry.hf})
        return tensor.float() if entry.fp32 else tensor

    def _read(self, hf_name: str) -> Tensor:
        shard = self._stored[hf_name].shard
        if shard not in self._open:
            self._open[shard] = self._files.enter_context(safe_open(shard, framework="pt"))
        return self._open[shard].get_tensor(hf_name)


@contextmanager
def open_hf_folder(folder: str | Path, model: ModelConfig) -> Iterator[HfReader]:
    """Check a folder against a model and yield its reader; files close at the end.

    Args:
        folder: Hugging Face folder.
        model: what `read_model_config` said about it.

    Raises:
        HfError: a tensor is missing, extra, misshapen or of a dtype that is not read; or see
            `read_stored`.
    """
    stored = read_stored(Path(folder))
    table = make_table(model)
    problems = table_problems(table, stored)
    if problems:
        raise HfError(
            f"{folder} does not hold the model of its config.json: {'; '.join(problems)}; "
            "export it again or correct config.json"
        )
    with ExitStack() as files:
        yield HfReader(table, stored, files)


def table_problems(table: dict[str, Entry], stored: dict[str, Stored]) -> list[str]:
    """Return in what the stored tensors differ from a table, a line for each kind of difference."""
    shapes = {
        name: shape
        for entry in table.values()
        for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)
    }
    present = stored.keys() & shapes.keys()
    kinds = {
        "missing": shapes.keys() - stored.keys(),
        "extra": stored.keys() - shapes.keys(),
        "misshapen": {name for name in present if stored[name].shape != shapes[name]},
        "of unread dtype": {name for name in present if stored[name].dtype not in DTYPES},
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
