"""Real text for the data benchmark, from what every installation of the project has.

The sources, headers and documentation of the interpreter and of the packages installed beside it,
in the order of their paths, each content once. Nothing of it is committed.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".html", ".h", ".hpp", ".cuh", ".c", ".cpp"}
MAX_FILE_BYTES = 2_000_000
CONTROL = b"<|"
"""Texts with a control token are left out: Megatron-LM reads them as one, we as text."""


def write_corpus(path: Path, max_bytes: int) -> dict[str, Any]:
    """Write JSONL of up to `max_bytes` of text and return what it holds."""
    documents = num_bytes = 0
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for name, text in _texts():
            if num_bytes >= max_bytes:
                break
            line = json.dumps({"id": name, "text": text}, ensure_ascii=False).encode() + b"\n"
            stream.write(line)
            digest.update(line)
            documents += 1
            num_bytes += len(text.encode())
    return {
        "documents": documents,
        "text_bytes": num_bytes,
        "file_bytes": path.stat().st_size,
        "sha256": digest.hexdigest(),
        "of": "sources, headers and documentation of Python and of the installed packages",
    }


def _texts() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each distinct text file, in a fixed order."""
    seen: set[bytes] = set()
    for kind in ("purelib", "stdlib"):
        root = Path(sysconfig.get_path(kind))
        for path in sorted(root.rglob("*")):
            if path.suffix not in SUFFIXES or not path.is_file():
                continue
            data = path.read_bytes()
            digest = hashlib.blake2b(data, digest_size=16).digest()
            usable = 0 < len(data) <= MAX_FILE_BYTES and 0 not in data and CONTROL not in data
            if not usable or digest in seen:
                continue
            seen.add(digest)
            try:
                yield f"{kind}/{path.relative_to(root)}", data.decode()
            except UnicodeDecodeError:
                continue
