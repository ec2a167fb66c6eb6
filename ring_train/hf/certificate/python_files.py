"""The code that comes with a folder: ours to the byte, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ring_train.config import ModelConfig
from ring_train.hf.family import FAMILIES
from ring_train.hf.remote_code import foreign_code

OTHER_CODE = ("custom_generate", "adapter_config.json")
"""What else transformers takes into a model without being asked: decoding and adapters."""


def compare_modeling_files(folder: Path, model: ModelConfig) -> tuple[list[str], dict[str, Any]]:
    """Return which files a program would run are not those of an export, byte for byte.

    Log-probabilities of some rows cannot prove a changed file right.
    """
    family = FAMILIES[model.architecture]
    names = foreign_code(folder, family)
    names += [name for name in OTHER_CODE if (folder / name).exists() and name not in names]
    differences = [
        f"{name} is not ring_train's own to the byte; export again with this version"
        for name in names
    ]
    return differences, {"num_files": len(family.modeling_files)}
