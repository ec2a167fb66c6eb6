"""Which Python of a folder would run, and whether it is ours."""

from pathlib import Path
from typing import Any

from ring_train.hf.errors import HfError
from ring_train.hf.family import FAMILIES, family_of


def check_remote_code(folder: Path, raw: dict[str, Any], *, trusted: bool) -> None:
    """Raise HfError if transformers would run Python of a folder that is not ours, byte by byte.

    Args:
        folder: Hugging Face folder.
        raw: its `config.json`.
        trusted: the person has said that foreign files may run.
    """
    family = FAMILIES[family_of(folder / "config.json", raw)]
    if "auto_map" not in raw:
        raise HfError(
            f"{folder / 'config.json'} has no auto_map: the folder ships no modeling files; "
            "export it again"
        )
    if trusted:
        return
    foreign = [
        path.name
        for path in family.modeling_files
        if not _same(folder / path.name, path.read_bytes())
    ]
    if raw["auto_map"] != family.auto_map:
        foreign.insert(0, f"auto_map={raw['auto_map']!r}")
    if foreign:
        raise HfError(
            f"{folder} would run Python that is not ring_train's own: {', '.join(foreign)}; export "
            "it again with this version, or add trust_remote_code=true if you trust the folder"
        )


def _same(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content
