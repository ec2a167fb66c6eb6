"""Files of results that jobs leave."""

import json
from pathlib import Path
from typing import Any


def write_json(path: str, value: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(value))
    partial.replace(path)
