"""Which Python of a folder would run, and whether it is ours."""

from pathlib import Path
from typing import Any

from ring_train.hf.errors import HfError
from ring_train.hf.family import FAMILIES, Family, family_of
from ring_train.hf.mtp import MTP_FOLDER

CODE_SUFFIXES = (".py", ".pyc", ".so")
"""Of files that Python can import."""


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
    foreign = foreign_code(folder, family)
    if raw["auto_map"] != family.auto_map:
        foreign.insert(0, f"auto_map={raw['auto_map']!r}")
    if foreign:
        raise HfError(
            f"{folder} would run Python that is not ring_train's own: {', '.join(foreign)}; export "
            "it again with this version, or add trust_remote_code=true if you trust the folder"
        )


def foreign_code(folder: Path, family: Family) -> list[str]:
    """Return the code in a folder that is not of its family's export, byte by byte.

    Everything is looked at: `from_pretrained` also runs files that no config names, such as
    custom_generate/generate.py.
    """
    ours = {path.name: path.read_bytes() for path in family.modeling_files}
    if (folder / MTP_FOLDER).is_dir():
        ours |= {f"{MTP_FOLDER}/{name}": content for name, content in ours.items()}
    names = [name for name, content in ours.items() if not _same(folder / name, content)]
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix in CODE_SUFFIXES and name not in ours:
            names.append(name)
    return names


def _same(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content
