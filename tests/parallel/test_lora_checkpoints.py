"""Checkpoints of adapters: any layout resumes another, bit for bit, and none is mistaken."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import OnRanks, RankError
from tests.parallel.lora_runs import LORA
from tests.parallel.short_runs import DISTRIBUTED_OPTIMIZER, EP2, PP2, TP2
from tests.parallel.test_checkpoint_layouts import (
    BF16,
    LOSS_TOLERANCE,
    SAVED_STEP,
    all_rows,
    digests,
    load,
    resume,
    save_weights,
    train_and_save,
)
from tests.parallel.test_resume import EVERY_STEP, run_until

ETP2 = ["parallel.expert_tensor_parallel_size=2"]
EXPERTS_OF_STAGE_1 = ["model.first_k_dense_replace=2", "lora.targets=[experts.linear_fc1]"]
EXPERTS_OF_STAGE_1 += ["parallel.pipeline_layers=[2,2]"]
ATTENTION = ["lora.targets=[linear_qkv,linear_proj,linear_gate]"]
LAYOUTS = {
    "one": (1, []),
    "tp2_ep2": (2, [*TP2, *EP2]),
    "etp2": (2, ETP2),
    "pp2": (2, PP2),
    "dp2_sharded": (2, DISTRIBUTED_OPTIMIZER),
}
PAIRS = [("tp2_ep2", "dp2_sharded"), ("dp2_sharded", "etp2"), ("etp2", "one"), ("pp2", "tp2_ep2")]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_adapters_that_one_layout_saves_another_continues(
    first: str, second: str, on_ranks: OnRanks, tmp_path: Path
) -> None:
    ranks, overrides = LAYOUTS[first]
    expected = on_ranks(ranks, train_and_save, tmp_path, [*LORA, *overrides])
    ranks, overrides = LAYOUTS[second]
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "resumed" / "checkpoints")
    found = on_ranks(ranks, resume, tmp_path / "resumed", [*LORA, *overrides])
    before = digests(tmp_path, SAVED_STEP)
    assert digests(tmp_path / "resumed", SAVED_STEP + 1) == before
    assert all_rows(found) == all_rows(expected)
    assert [part.loss for part in found] == pytest.approx(
        [expected[0].loss] * len(found), rel=LOSS_TOLERANCE, abs=0
    )
    moments = {key for key in before if key.startswith("exp_avg")}
    assert moments
    assert all(key.endswith(("lora_a", "lora_b")) for key in moments)
    assert "weight/embedding.word_embeddings.weight" in before


RESUMED = {
    "tp2_sharded_bf16": (2, [*TP2, *DISTRIBUTED_OPTIMIZER, *BF16, *ATTENTION]),
    "pp2_first_stage_trains_nothing": (2, [*PP2, *EXPERTS_OF_STAGE_1]),
    "pp2_sharded_last_stage_trains_nothing": (
        2,
        [*PP2, *DISTRIBUTED_OPTIMIZER, "lora.targets=[mlp.linear_fc2]"],
    ),
}


@pytest.mark.parametrize("layout", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(
    layout: str, on_ranks: OnRanks, tmp_path: Path
) -> None:
    ranks, overrides = RESUMED[layout]
    words = [*LORA, *EVERY_STEP, "optim.lr_warmup_steps=0", *overrides]
    whole = on_ranks(ranks, run_until, tmp_path / "whole", 3, words)
    on_ranks(ranks, run_until, tmp_path / "cut", 1, words)
    assert on_ranks(ranks, run_until, tmp_path / "cut", 3, words) == whole
    base, adapters = [
        {
            key: (first, digests(tmp_path / "whole", 3)[key])
            for key, first in digests(tmp_path / "whole", 1).items()
            if key.startswith("weight/") and key.endswith(("lora_a", "lora_b")) == is_adapter
        }
        for is_adapter in (False, True)
    ]
    assert all(first == last for first, last in base.values())
    assert all(first != last for first, last in adapters.values())


def test_a_model_with_adapters_starts_from_one_without_and_from_its_like(
    on_ranks: OnRanks, tmp_path: Path
) -> None:
    from ring_train.model.lora import is_adapter

    plain = on_ranks(1, save_weights, tmp_path / "plain", [])[0]
    onto_plain = on_ranks(1, load, tmp_path / "plain", LORA)[0]
    assert all(onto_plain[name].equal(weight) for name, weight in plain.items())
    fresh = {name for name in onto_plain if is_adapter(name)}
    assert fresh == onto_plain.keys() - plain.keys()
    assert not any(onto_plain[name].any() for name in fresh if name.endswith("lora_b"))
    adapted = on_ranks(1, save_weights, tmp_path / "adapted", LORA)[0]
    onto_adapted = on_ranks(2, load, tmp_path / "adapted", [*LORA, *EP2])
    for part in onto_adapted:
        assert all(weight.equal(adapted[name]) for name, weight in part.items())
    assert set().union(*onto_adapted) == adapted.keys()


REFUSED = {
    "without adapters": ([], r"lora.rank=None \(checkpoint: 4\)"),
    "of another rank": ([*LORA, "lora.rank=8"], r"lora.rank=8 \(checkpoint: 4\)"),
    "of other targets": ([*LORA, "lora=attention", "lora.rank=4"], "lora.targets=.'linear_proj'"),
}


def test_adapters_of_a_checkpoint_are_neither_dropped_nor_mistaken(
    on_ranks: OnRanks, tmp_path: Path
) -> None:
    on_ranks(1, save_weights, tmp_path, LORA)
    for overrides, message in REFUSED.values():
        with pytest.raises(RankError, match=message):
            on_ranks(1, load, tmp_path, overrides)
        with pytest.raises(RankError, match=message):
            on_ranks(1, resume, tmp_path, overrides)
