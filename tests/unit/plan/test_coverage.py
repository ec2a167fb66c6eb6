"""Only layouts whose kind was compared with one rank pass the plan."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ring_train.config import compose
from ring_train.plan import PlanError, make_plan
from ring_train.plan import coverage as coverage_module

SIZES = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
}
TINY = ["model=tiny", "train.seq_length=64", "train.micro_batch_size=2"]
DENSE = [
    "model.num_moe_experts=null",
    "model.mtp_num_layers=0",
    "model.moe_router_enable_expert_bias=false",
    "parallel.sequence_parallel=false",
]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A table of three kinds in place of the committed one."""
    rows = [
        {"kind": [], "flags": ["mtp"]},
        {"kind": ["tp", "pp", "dp"], "flags": ["mtp"]},
        {"kind": ["cp", "dp"], "flags": ["mtp", "distributed_optimizer"]},
    ]
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"megatron_core": "0", "kinds": rows}))
    monkeypatch.setattr(coverage_module, "TABLE_FILE", file)
    coverage_module.certified.cache_clear()
    yield
    coverage_module.certified.cache_clear()


def plan(world_size: int, words: list[str], **sizes: int) -> None:
    degrees = [f"{SIZES[name]}={size}" for name, size in sizes.items()]
    make_plan(compose("pretrain", [*TINY, *degrees, *words]), world_size)


def test_the_size_of_a_degree_does_not_matter(table: None) -> None:
    plan(8, [], tp=2, pp=2)
    plan(16, [], cp=4)
    plan(1, [])


def test_an_uncovered_kind_is_refused_with_the_nearest_covered_one(table: None) -> None:
    with pytest.raises(PlanError, match=r"the kind tp\+pp has not .* that has is tp\+pp\+dp; "):
        plan(4, [], tp=2, pp=2)


def test_an_uncovered_flag_is_refused_by_name(table: None) -> None:
    plan(4, ["parallel.use_distributed_optimizer=true"], cp=2)
    message = r"distributed_optimizer has not been compared .* in the kind tp\+pp\+dp"
    with pytest.raises(PlanError, match=message):
        plan(8, ["parallel.use_distributed_optimizer=true"], tp=2, pp=2)


def test_who_insists_may_run_it(table: None) -> None:
    plan(4, ["parallel.allow_uncertified=true"], tp=2, pp=2)


def test_the_committed_table_knows_every_kind_of_the_presets_and_no_other() -> None:
    plan(16, ["parallel.expert_model_parallel_size=4"], tp=2, pp=2, cp=2)
    with pytest.raises(PlanError, match="no_sequence_parallel has not been compared"):
        plan(2, DENSE, tp=2)
