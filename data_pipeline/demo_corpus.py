"""Write a corpus of real text from this Python installation: `python -m data_pipeline.demo_corpus`.

Three domains: `code` (sources without docstrings), `prose` (docstrings and documentation files) and
`math` (generated problems with worked chains). Whole packages are held out, near-duplicates are
removed, and no download is needed. The same installation and seed give the same bytes.
"""

import dataclasses
import hashlib
import logging
import multiprocessing
import os
import platform
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_pipeline.config import PipelineError, run_command
from data_pipeline.deduplicate import Deduplicator
from data_pipeline.documents import Document, file_sha256, write_documents, write_json
from data_pipeline.math_problems import generate_problems, is_held_out
from data_pipeline.python_sources import PackageText, find_packages, limited, read_package

logger = logging.getLogger(__name__)

SPLITS = ("valid", "train")
"""Held-out text first: what it contains is dropped from the training split, not the reverse."""
MAX_HELD_OUT_FRACTION = 0.1
"""No package gives more of a held-out domain, so that the loss is not that of one style."""
MIN_DOCUMENT_CHARACTERS = 250
MAX_PROSE_CHARACTERS = 16_000
"""Docstrings of one module are joined up to this length."""
PROBLEMS_PER_DOCUMENT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoCorpus:
    """Arguments."""

    output: str
    """Folder; receives DOMAIN.SPLIT.jsonl and manifest.json."""
    package_code_bytes: int = 70_000
    """Limit per package, so that none dominates."""
    package_prose_bytes: int = 180_000
    """Limit per package."""
    valid_bytes: int = 400_000
    """Packages are held out until code and prose have this much each."""
    math_bytes: int = 4_000_000
    seed: int = 1234
    workers: int = 0
    """Processes; 0 for one per core."""


def main() -> int:
    """Build the corpus and return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_command(DemoCorpus, build_demo_corpus)


def build_demo_corpus(arguments: DemoCorpus) -> None:
    """Write the corpus of the running interpreter's installation."""
    paths = sysconfig.get_paths()
    folders = [Path(paths["stdlib"]), Path(paths["purelib"])]
    write_demo_corpus(arguments, folders)


def write_demo_corpus(arguments: DemoCorpus, folders: Iterable[Path]) -> None:
    """Write DOMAIN.SPLIT.jsonl for three domains and two splits, and manifest.json last."""
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    manifest_path = output / "manifest.json"
    manifest_path.unlink(missing_ok=True)
    dropped: Counter[str] = Counter()
    packages = _read_packages(arguments, folders)
    for package in packages:
        dropped.update({f"file/{reason}": n for reason, n in package.dropped.items()})
    held_out = _held_out_packages(packages, arguments.valid_bytes)
    names = {package.name for package in held_out}
    texts = {"valid": held_out, "train": [p for p in packages if p.name not in names]}
    files = {}
    for domain, documents_of in (("code", _code_documents), ("prose", _prose_documents)):
        deduplicator = Deduplicator()
        seen: set[str] = set()
        for split in SPLITS:
            candidates = documents_of(texts[split], seen)
            kept = _deduplicated(candidates, deduplicator, dropped)
            files[f"{domain}.{split}"] = _write(output, domain, split, kept)
    for split, documents in _math_documents(arguments).items():
        files[f"math.{split}"] = _write(output, "math", split, documents)
    write_json(
        manifest_path,
        {
            "arguments": {k: v for k, v in dataclasses.asdict(arguments).items() if k != "output"},
            "dropped": dropped,
            "files": files,
            "held_out_packages": sorted(names),
            "python": platform.python_version(),
        },
    )


def _read_packages(arguments: DemoCorpus, folders: Iterable[Path]) -> list[PackageText]:
    packages = find_packages(folders)
    limits = (arguments.package_code_bytes, arguments.package_prose_bytes)
    jobs = [(package, *limits) for package in packages]
    workers = arguments.workers or os.cpu_count() or 1
    if workers == 1:
        return [read_package(*job) for job in jobs]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.starmap(read_package, jobs, chunksize=1)


def _held_out_packages(packages: list[PackageText], valid_bytes: int) -> list[PackageText]:
    """Return packages, in the order of their names' hashes, until they have enough text."""
    held_out: list[PackageText] = []
    sizes = {"code": 0, "prose": 0}
    max_bytes = int(MAX_HELD_OUT_FRACTION * valid_bytes)
    for package in sorted(packages, key=lambda p: hashlib.sha256(p.name.encode()).digest()):
        if min(sizes.values()) >= valid_bytes:
            break
        part = limited(package, max_bytes)
        held_out.append(part)
        sizes["code"] += part.code_bytes()
        sizes["prose"] += part.prose_bytes()
    if min(sizes.values()) < valid_bytes or len(held_out) == len(packages):
        raise PipelineError(
            f"valid_bytes={valid_bytes}: all {len(packages)} packages together hold out {sizes} "
            "and leave nothing to train on; lower valid_bytes"
        )
    return held_out


def _code_documents(packages: Iterable[PackageText], _: set[str]) -> Iterator[Document]:
    for package in packages:
        for name, code in package.code:
            yield Document(f"code/{name}", code, "code")


def _prose_documents(packages: Iterable[PackageText], seen: set[str]) -> Iterator[Document]:
    """Yield the docstrings of each file, joined; those of `seen` are left out, and extend it."""
    for package in packages:
        for name, sections in package.prose:
            fresh = [text for text in dict.fromkeys(sections) if text not in seen]
            seen.update(fresh)
            for index, text in enumerate(_joined(fresh)):
                yield Document(f"prose/{name}:{index}", text, "prose")


def _joined(sections: list[str]) -> Iterator[str]:
    """Yield the sections joined by blank lines into texts of about MAX_PROSE_CHARACTERS."""
    group: list[str] = []
    for section in sections:
        if group and sum(map(len, group)) + len(section) > MAX_PROSE_CHARACTERS:
            yield "\n\n".join(group) + "\n"
            group = []
        group.append(section)
    if group:
        yield "\n\n".join(group) + "\n"


def _math_documents(arguments: DemoCorpus) -> dict[str, list[Document]]:
    """Return both splits of the math domain; no problem, however reordered, is in both or twice."""
    fraction = min(0.5, arguments.valid_bytes / arguments.math_bytes)
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    num_bytes = 0
    problems = generate_problems(arguments.seed)
    while num_bytes < arguments.math_bytes:
        problem = next(problems)
        line = problem.line() + "\n"
        lines["valid" if is_held_out(problem, fraction=fraction) else "train"].append(line)
        num_bytes += len(line)
    return {
        split: [
            Document(
                f"math/{split}/{start}", "".join(of[start : start + PROBLEMS_PER_DOCUMENT]), "math"
            )
            for start in range(0, len(of), PROBLEMS_PER_DOCUMENT)
        ]
        for split, of in lines.items()
    }


def _deduplicated(
    documents: Iterable[Document], deduplicator: Deduplicator, dropped: Counter[str]
) -> Iterator[Document]:
    for document in documents:
        short = len(document.text) < MIN_DOCUMENT_CHARACTERS
        reason = "too_short" if short else deduplicator.drop_reason(document.text)
        if reason is None:
            yield document
        else:
            dropped[f"{document.domain}/{reason}"] += 1


def _write(
    output: Path, domain: str, split: str, documents: Iterable[Document]
) -> dict[str, object]:
    kept = list(documents)
    path = output / f"{domain}.{split}.jsonl"
    write_documents(path, kept)
    text_bytes = sum(len(document.text.encode()) for document in kept)
    logger.info("%s: %d documents, %.2f MB of text", path.name, len(kept), text_bytes / 1e6)
    return {"documents": len(kept), "text_bytes": text_bytes, "sha256": file_sha256(path)}


if __name__ == "__main__":
    sys.exit(main())
