"""Code and prose of the Python packages installed here, one record per package.

Test suites and vendored copies are left out: the first are full of tables, the second would put one
package on both sides of a split by package.
"""

import dataclasses
import hashlib
import importlib.metadata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.docstrings import split_source

SKIPPED_FOLDERS = frozenset(
    (
        *("__pycache__", "dist-packages", "site-packages"),
        *("idle_test", "test", "testing", "tests"),
        *("_vendor", "extern", "externals", "third_party", "vendor", "vendored"),
    )
)
SKIPPED_DOCUMENTS = (
    "author",
    "contributor",
    "copying",
    "copyright",
    "credits",
    "license",
    "notice",
)
MAX_FILE_BYTES = 1_000_000
"""Larger modules are generated tables."""
MAX_LINE_CHARACTERS = 400
"""Code with a longer line holds data."""
MAX_SOURCE_BYTES = 1_200_000
"""Source read per package; bounds the time spent on one that has little prose."""
MIN_ALPHABETIC_FRACTION = 0.5
"""Text with fewer letters is a table or a number dump."""


@dataclasses.dataclass(frozen=True, slots=True)
class Package:
    """Where the text of one top-level package lies."""

    name: str
    modules: tuple[Path, ...]
    documents: tuple[Path, ...]
    """README, METADATA and other documentation files."""


@dataclasses.dataclass(frozen=True, slots=True)
class PackageText:
    """The text of a package by file, up to a number of bytes per kind."""

    name: str
    code: tuple[tuple[str, str], ...]
    """(file, source without docstrings)"""
    prose: tuple[tuple[str, tuple[str, ...]], ...]
    """(file, docstrings or sections)"""
    dropped: dict[str, int]
    """Files by reason."""

    def code_bytes(self) -> int:
        """Return the characters of code."""
        return sum(len(code) for _, code in self.code)

    def prose_bytes(self) -> int:
        """Return the characters of prose."""
        return sum(len(text) for _, sections in self.prose for text in sections)


def limited(package: PackageText, max_bytes: int) -> PackageText:
    """Return the first files of a package up to the limit on code, and on prose; at least one."""
    code, prose = [], []
    sizes = [0, 0]
    for name, text in package.code:
        if sizes[0] < max_bytes:
            code.append((name, text))
        sizes[0] += len(text)
    for name, sections in package.prose:
        if sizes[1] < max_bytes:
            prose.append((name, sections))
        sizes[1] += sum(map(len, sections))
    return dataclasses.replace(package, code=tuple(code), prose=tuple(prose))


def find_packages(folders: Iterable[Path]) -> list[Package]:
    """Return the packages directly under `folders` (the standard library, site-packages) by name.

    A module file of the standard library is a package of its own. Documentation of a distribution
    belongs to the first of its import names.
    """
    modules: dict[str, list[Path]] = defaultdict(list)
    documents: dict[str, list[Path]] = defaultdict(list)
    for folder in folders:
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and _is_package_folder(entry.name):
                found = _files_under(entry)
                modules[entry.name] += [path for path in found if path.suffix == ".py"]
                documents[entry.name] += [path for path in found if _is_documentation(path)]
            elif entry.suffix == ".py" and not entry.name.startswith("__"):
                modules[entry.stem].append(entry)
        for distribution in importlib.metadata.distributions(path=[str(folder)]):
            name = _import_name(distribution)
            documents[name].append(
                Path(str(distribution.locate_file(_metadata_path(distribution))))
            )
    names = sorted(modules.keys() | documents.keys())
    return [Package(n, tuple(modules[n]), tuple(sorted(documents[n]))) for n in names]


def read_package(package: Package, max_code_bytes: int, max_prose_bytes: int) -> PackageText:
    """Return the text of a package up to the limits, files in the order of their names' hashes."""
    dropped: dict[str, int] = defaultdict(int)
    code: list[tuple[str, str]] = []
    prose = [
        (_relative(path, package.name), sections)
        for path in package.documents
        if (sections := _sections(path))
    ]
    code_bytes, source_bytes = 0, 0
    prose_bytes = sum(len(text) for _, sections in prose for text in sections)
    modules = [(_relative(path, package.name), path) for path in package.modules]
    for name, path in sorted(modules, key=lambda item: hashlib.sha256(item[0].encode()).digest()):
        wants_code, wants_prose = code_bytes < max_code_bytes, prose_bytes < max_prose_bytes
        if source_bytes > MAX_SOURCE_BYTES or not (wants_code or wants_prose):
            dropped["beyond_package_limit"] += 1
            continue
        source = _read_text(path)
        if source is None:
            dropped["too_large_or_not_utf8"] += 1
            continue
        source_bytes += len(source)
        try:
            split = split_source(source)
        except (SyntaxError, ValueError, RecursionError):
            dropped["not_parseable"] += 1
            continue
        if wants_code and split.code:
            if max(map(len, split.code.split("\n"))) > MAX_LINE_CHARACTERS or _is_table(split.code):
                dropped["code_is_data"] += 1
            else:
                code.append((name, split.code))
                code_bytes += len(split.code)
        if wants_prose and split.prose:
            prose.append((name, split.prose))
            prose_bytes += sum(map(len, split.prose))
    return PackageText(package.name, tuple(code), tuple(prose), dict(dropped))


def _is_package_folder(name: str) -> bool:
    return name not in SKIPPED_FOLDERS and name.isidentifier() and not name.startswith("__")


def _files_under(folder: Path) -> list[Path]:
    found = []
    for root, folders, names in folder.walk():
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        found += [root / name for name in sorted(names)]
    return found


def _is_documentation(path: Path) -> bool:
    stem = path.name.lower()
    if stem.startswith(SKIPPED_DOCUMENTS):
        return False
    return path.suffix in (".rst", ".md") or (path.suffix == ".txt" and stem.startswith("readme"))


def _import_name(distribution: importlib.metadata.Distribution) -> str:
    tops = {path.parts[0] for path in distribution.files or () if path.suffix in (".py", ".so")}
    names = sorted(top.removesuffix(".py") for top in tops if not top.startswith("_"))
    return next((name for name in names if name.isidentifier()), distribution.name)


def _metadata_path(distribution: importlib.metadata.Distribution) -> str:
    names = [str(p) for p in distribution.files or () if p.name == "METADATA" and len(p.parts) == 2]
    return names[0] if names else f"{distribution.name}.dist-info/METADATA"


def _relative(path: Path, package: str) -> str:
    """Return the path from the package's folder on, the same on every machine."""
    parts = path.parts
    if package in parts:
        return "/".join(parts[len(parts) - 1 - parts[::-1].index(package) :])
    if path.name == "METADATA":  # several distributions may share one import name
        return f"{package}/{path.parent.name}/{path.name}"
    return f"{package}/{path.name}"


def _sections(path: Path) -> tuple[str, ...]:
    """Return the sections of a documentation file, without the header fields of a METADATA file."""
    text = _read_text(path)
    if text is None:
        return ()
    if path.name == "METADATA":
        text = text.partition("\n\n")[2]
    return tuple(part.strip() for part in text.split("\n\n") if part.strip())


def _read_text(path: Path) -> str | None:
    if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
        return None
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n").replace("\x00", "")
    except UnicodeDecodeError:
        return None


def _is_table(text: str) -> bool:
    letters = sum(map(str.isalpha, text))
    return letters < MIN_ALPHABETIC_FRACTION * len("".join(text.split()))
