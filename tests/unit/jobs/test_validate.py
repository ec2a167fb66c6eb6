"""Which data weights are validated on, and the table."""

from pathlib import Path

import pytest

from ring_train.config import LoraConfig, ModelConfig, Precision, ValidateConfig, compose
from ring_train.errors import UserError
from ring_train.jobs.initial_model import InitialModel
from ring_train.jobs.validate import main, read_run, table, validation_plan
from tests.unit.checkpoint.small_checkpoints import random_tensors, save

HELD_OUT = ["data.domains.a={path:a,valid_path:b}", "train=cpu", "optim=short"]


def config(*words: str) -> ValidateConfig:
    return compose("validate", ["weights=[x]", *words])


def source(folder: Path, precision: Precision | None, model: ModelConfig) -> InitialModel:
    return InitialModel(
        folder=folder, model=model, tokenizer="", precision=precision, lora=LoraConfig()
    )


@pytest.fixture
def tiny() -> ModelConfig:
    return compose("pretrain", ["model=tiny"]).model


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    save(tmp_path / "run", 3, random_tensors(0), ["model=tiny", *HELD_OUT, "run_dir=elsewhere"])
    return tmp_path / "run"


def test_the_data_is_that_of_the_first_checkpoint(run_dir: Path, tiny: ModelConfig) -> None:
    sources = [source(Path("hf"), None, tiny), source(run_dir, Precision.fp32, tiny)]
    found = read_run(config(), sources)
    assert found.data.domains["a"].valid_path == "b"
    assert found.data.index_dir == "elsewhere/index"


def test_rows_are_those_of_the_run_and_the_model_that_of_the_weights(
    run_dir: Path, tiny: ModelConfig
) -> None:
    run = read_run(config(f"run={run_dir}"), [source(Path("hf"), None, tiny)])
    tiny.num_layers = 6
    plan = validation_plan(config("eval_steps=7"), run, source(Path("hf"), None, tiny))
    assert plan.config.model.num_layers == 6
    assert plan.config.train.precision is Precision.fp32
    assert plan.config.train.eval_steps == 7
    phase = plan.phases[-1].batch
    assert (phase.seq_length, phase.micro_batch_size) == (256, 2)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_not_those_of_the_run(steps: int) -> None:
    with pytest.raises(UserError, match=f"eval_steps={steps} is not positive; choose 1 or more"):
        main(["weights=[x]", f"eval_steps={steps}"])


def test_folders_that_name_no_data_are_refused(tiny: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which name no data; add run=DIR"):
        read_run(config(), [source(Path("hf"), None, tiny)])
    with pytest.raises(UserError, match=r"weights=\[\] is empty"):
        main(["weights=[]"])
    save(tmp_path, 3, random_tensors(0))
    with pytest.raises(UserError, match="no domain has a held-out shard"):
        read_run(config(f"run={tmp_path}"), [source(Path("hf"), None, tiny)])


def test_the_table_has_a_line_for_each_of_the_weights() -> None:
    lines = table(["a", "longer"], [{"code": 5.0, "math": 0.52}, {"code": 4.5, "math": 0.5}])
    assert lines.splitlines() == [
        "nats per token    code    math",
        "a               5.0000  0.5200",
        "longer          4.5000  0.5000",
    ]
