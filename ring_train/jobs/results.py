"""Files of results that jobs leave."""

import json
import os
from pathlib import Path
from typing import Any

from ring_train.errors import UserError


def write_json(path: str, value: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    partial = Path(f"{path}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(value))
        partial.replace(path)
    except OSError as error:
        if partial.is_file():
            partial.unlink()
        raise UserError(f"{path} cannot be written ({error}); name another file") from None


def check_writable(key: str, path: str) -> None:
    """Check, without writing, that a file of results can be written; any rank may ask.

    Raises:
        UserError: it is a folder, or its folder cannot be made or written to.
    """
    for target in (Path(path), Path(f"{path}.partial")):
        if os.path.isdir(target):
            raise UserError(f"{key}={path}: {target} is a folder; name a file")
    folder = Path(path).absolute().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"{key}={path} cannot be written: {folder} is no folder that may be written to; "
            "name another file"
        )
