"""Benchmarks for a GPU run on a CPU at tiny sizes: their code is whole, the figures are void."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo.files import ROOT


def test_every_fused_op_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    from bench.fused import Sizes, measure

    rows = measure(Sizes(tokens=16, hidden=256, experts=32, vocabulary=64), "cpu")["rows"]
    assert len({row["op"] for row in rows}) == len(rows) == 7
    assert all(row["forward_ms"] > 0 and row["both_ms"] > 0 for row in rows)
    assert capsys.readouterr().out.count("forward") == 7


def test_steps_are_made_with_natural_and_even_routing(tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    words = ["model=tiny", "tokens=32", "steps=1", f"output={output}"]
    subprocess.run([sys.executable, "bench/step.py", *words], cwd=ROOT, check=True)
    rows = json.loads(output.read_text())["rows"]
    assert [row["even_routing"] for row in rows] == [False, True]
    assert all(row["step_s"] > 0 and row["predicted_bytes"] > 0 for row in rows)


def test_even_routing_sends_every_expert_as_many_tokens() -> None:
    import torch

    from bench.step import force_even_routing
    from ring_train.model.router import ExpertRouter
    from tests.unit.plan.configs import tiny

    model = tiny().model
    router = ExpertRouter.__new__(ExpertRouter)
    torch.nn.Module.__init__(router)
    router.model = model
    force_even_routing([router])
    logits = torch.randn(64, model.num_moe_experts or 0, requires_grad=True)
    weights, chosen = router.routing(logits)
    assert chosen.sum(0).unique().numel() == 1
    assert torch.equal(chosen.sum(1), torch.full((64,), model.moe_router_topk))
    total = torch.full((64,), model.moe_router_topk_scaling_factor)
    torch.testing.assert_close(weights.sum(1), total)
