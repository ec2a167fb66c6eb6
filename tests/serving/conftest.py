"""Folders and engines that the tests of this folder share; run by `make test-serving`."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"

from ring_linear_vllm.score import set_environment

set_environment(tensor_parallel_size=1)

from ring_linear_vllm.engine import build_engine, close_engine  # noqa: E402
from vllm import LLM  # noqa: E402

from tests.serving.folders import (  # noqa: E402
    longest_prompt,
    make_first_folder,
    make_linear_folder,
    make_softmax_folder,
)

NUM_BLOCKS = 24
"""Of the cache: so few that later requests get the blocks of earlier ones."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exported folders: the hybrid under both decay rules, and both softmax families."""
    root = tmp_path_factory.mktemp("folders")
    linear = {rule: make_linear_folder(root / rule, rule) for rule in ("zero_based", "shifted")}
    softmax = make_softmax_folder(root / "softmax")
    return {**linear, "softmax": softmax, "first": make_first_folder(root / "first")}


@pytest.fixture(scope="module")
def engine_of(folders: dict[str, Path]) -> Iterator[Callable[..., LLM]]:
    """Give the engine of (folder, settings); one exists at a time, the last one is kept."""
    kept: dict[Any, LLM] = {}

    def get(name: str, **settings: Any) -> LLM:
        key = (name, *sorted(settings.items()))
        if key not in kept:
            for last in list(kept):
                close_engine(kept.pop(last))
            kept[key] = build_engine(
                str(folders[name]),
                max_tokens=longest_prompt() + 1,
                trust_remote_code=name in ("softmax", "first"),
                num_gpu_blocks_override=NUM_BLOCKS,
                **settings,
            )
        return kept[key]

    yield get
    for engine in kept.values():
        close_engine(engine)
