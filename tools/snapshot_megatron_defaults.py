"""Write the names and defaults of megatron-core's TransformerConfig to a JSON file.

The plan reads that file instead of importing megatron. Run this after changing the pinned version:
`python tools/snapshot_megatron_defaults.py`.
"""

import dataclasses
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

FIELDS_FILE = Path(__file__).resolve().parents[1] / "ring_train" / "plan" / "megatron_fields.json"


def snapshot() -> dict[str, Any]:
    """Return {"megatron_core": version, "fields": {name: default}} of the installed megatron."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = {field.name: _default(field) for field in dataclasses.fields(TransformerConfig)}
    return {"megatron_core": version("megatron-core"), "fields": fields}


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return a default as JSON has it; what JSON lacks becomes its text."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    default = field.default
    if default is None or isinstance(default, bool | int | float | str):
        return default
    return getattr(default, "__name__", str(default))


def main() -> int:
    """Write the snapshot; return the exit status."""
    FIELDS_FILE.write_text(json.dumps(snapshot(), indent=1) + "\n", encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main())
