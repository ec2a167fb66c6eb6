"""A small tokenizer, and a folder of it for each shape of template."""

import json
from pathlib import Path

import pytest

from tests.unit.data_pipeline.chat.shapes import LING, write_shape, write_shapes


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shape -> folder."""
    return write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def ling(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the released Ling 2.0 template."""
    if not LING.is_file():
        pytest.skip("the released Ling 2.0 template is not beside this checkout")
    template = json.loads(LING.read_text())["chat_template"]
    return write_shape(folders["ours"], tmp_path_factory.mktemp("ling") / "ling", template)
