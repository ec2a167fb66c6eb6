"""What tests of Hugging Face folders share."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ring_train.config import DecayLayerRule, ModelConfig, WeightFormat, compose
from ring_train.hf.config import read_model_config
from ring_train.hf.reader import open_hf_folder
from ring_train.hf.writer import HfFormat, write_hf_folder

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
RULES = {
    "ling_v2": None,
    "ring_linear_v2": DecayLayerRule.shifted,
    "ring_lite_v1": None,
}
"""Golden folders, and the decay rule that they do not say."""


@pytest.fixture
def golden_copy(tmp_path: Path) -> Callable[[str], Path]:
    """A golden folder that a test may damage."""

    def copy(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(GOLDEN / name, folder)
        for path in (folder, *folder.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        return folder

    return copy


@pytest.fixture
def tiny() -> ModelConfig:
    """The tiny hybrid preset: both token mixers, both channel mixers, one MTP layer."""
    return compose("pretrain", ["model=tiny"]).model


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Golden folders through the trainer's names and out again, in several shards."""
    folders = {}
    for name, rule in RULES.items():
        folders[name] = tmp_path_factory.mktemp("exported") / name
        model = read_model_config(GOLDEN / name, rule)
        with open_hf_folder(GOLDEN / name, model) as reader:
            write_hf_folder(
                folders[name],
                model,
                reader.read_logical,
                form=HfFormat(weights=WeightFormat.fp32, max_shard_bytes=1_000_000),
                tokenizer_dir=GOLDEN / name,
            )
    return folders
