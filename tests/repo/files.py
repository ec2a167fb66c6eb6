"""The files that tests/repo looks at."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
BINARY = {".safetensors", ".png", ".npz", ".bin", ".idx", ".pdf"}


def repository_files(*suffixes: str) -> list[Path]:
    """Return the paths below ROOT that git tracks or would track, of these suffixes if any."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [Path(name) for name in listed.split("\0") if name]
    return [p for p in paths if (not suffixes or p.suffix in suffixes) and (ROOT / p).is_file()]


def text_files() -> list[Path]:
    """Return the files that people read and write: no weights, no pictures, no golden vectors."""
    return [
        p
        for p in repository_files()
        if p.suffix not in BINARY and (p.parts[:2] != ("tests", "golden") or p.suffix == ".md")
    ]
