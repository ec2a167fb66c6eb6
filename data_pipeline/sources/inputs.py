"""The grammar of sources: what a user types, and the inputs it stands for.

    SOURCE   = SPEC { "," SPEC }            read one after the other
    SPEC     = [KIND ":"] PATTERN           a file, a quoted glob (** descends) or a folder
             | "hf:" NAME [":" SPLIT]       a Hugging Face dataset: a folder or a hub id
    KIND     = "jsonl" | "parquet" | "arrow" | "text" | "tree"

Without KIND the suffix decides; a folder is a source tree, or a dataset if save_to_disk wrote it.
Files of one SPEC are read in the order of their names.
"""

import dataclasses
import glob
import os
from pathlib import Path

from data_pipeline.config import PipelineError

KINDS = ("jsonl", "parquet", "arrow", "text", "tree")
SUFFIXES = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    ".parquet": "parquet",
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow"),
    **dict.fromkeys((".txt", ".md", ".rst", ".html", ".tex"), "text"),
    **dict.fromkeys((".py", ".c", ".h", ".cpp", ".hpp", ".cu", ".js", ".ts"), "text"),
    **dict.fromkeys((".java", ".go", ".rs", ".sh", ".toml", ".yaml", ".css"), "text"),
}
COMPRESSIONS = (".gz", ".zst")
DATASET_MARKS = ("dataset_dict.json", "state.json")
"""Files that `datasets.save_to_disk` leaves in its folder."""


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """One file, tree or dataset."""

    kind: str
    """One of KINDS, `gz` or `zst` (compressed JSONL), or `hf`."""
    path: str
    """Of the file or folder; for `hf` NAME[:SPLIT]."""
    name: str
    """Path relative to the folder that all inputs share: stable where the corpus is moved."""
    num_bytes: int
    """On disk; 0 where unknown."""
    mtime_ns: int

    @property
    def stem(self) -> str:
        """The name of the file up to its first dot: the domain of records that name none."""
        return Path(self.name).name.split(".")[0]


def find_inputs(source: str) -> list[Input]:
    """Return the inputs that `source` stands for, in the order they are read.

    Raises:
        PipelineError: a part matches nothing, or its kind cannot be told.
    """
    found = [pair for part in source.split(",") for pair in _find(part.strip(), source)]
    folders = [os.path.dirname(os.path.abspath(path)) for kind, path in found if kind != "hf"]
    common = os.path.commonpath(folders) if folders else ""
    return [_input(kind, path, common) for kind, path in found]


def _find(part: str, source: str) -> list[tuple[str, str]]:
    """Return (kind, path) of each input of one SPEC."""
    kind, colon, pattern = part.partition(":")
    if colon and kind == "hf":
        return [("hf", pattern)]
    if not colon or kind not in KINDS:
        kind, pattern = "", part
    paths = sorted(glob.glob(pattern, recursive=True))
    files = [path for path in paths if os.path.isfile(path)]
    if not files and paths:
        return [_folder(path, kind) for path in paths]
    if not files:
        raise PipelineError(
            f"input={source}: {pattern!r} matches no file; give a file, a folder, a quoted glob, "
            "or hf:NAME"
        )
    return [(_kind(path, kind), path) for path in files]


def _folder(path: str, kind: str) -> tuple[str, str]:
    if not kind and any(os.path.exists(os.path.join(path, mark)) for mark in DATASET_MARKS):
        return ("hf", path)
    if kind not in ("", "tree"):
        raise PipelineError(f"input={path} is a folder; {kind}: wants files, e.g. {path}/*")
    return ("tree", path)


def _kind(path: str, kind: str) -> str:
    root, suffix = os.path.splitext(path)
    packed = suffix in COMPRESSIONS
    kind = kind or SUFFIXES.get(os.path.splitext(root)[1] if packed else suffix, "")
    if not kind or (packed and kind != "jsonl") or kind == "tree":
        raise PipelineError(
            f"input={path}: its suffix does not tell what it holds; put a kind before it, "
            f"e.g. jsonl:{path} or text:{path}"
        )
    return suffix[1:] if packed else kind


def _input(kind: str, path: str, common: str) -> Input:
    if kind == "hf" and not os.path.isdir(path.partition(":")[0]):
        return Input(kind, path, path, 0, 0)
    path_on_disk = path.partition(":")[0] if kind == "hf" else path
    name = os.path.relpath(os.path.abspath(path_on_disk), common) if common else path_on_disk
    status = os.stat(path_on_disk)
    if os.path.isfile(path_on_disk):
        return Input(kind, path, name, status.st_size, status.st_mtime_ns)
    files = [os.stat(file) for file in walk_files(path_on_disk)]
    newest = max((file.st_mtime_ns for file in files), default=status.st_mtime_ns)
    return Input(kind, path, name, sum(file.st_size for file in files), newest)


def walk_files(folder: str) -> list[str]:
    """Return the files below a folder in the order of their relative paths; hidden ones not."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if os.path.isfile(path))
