"""A run through phases, as a user starts, stops, resumes, checks and exports it."""

import json
import shutil
from pathlib import Path

import pytest

from ring_train.config import read_yaml
from tests.conftest import OnRanks
from tests.e2e.commands import run_job, succeed

SCORE_TOLERANCE = 2e-5
"""fp32 log-probabilities of one model by two programs."""


@pytest.fixture
def words(training: list[str]) -> list[str]:
    """Three phases on two ranks; the last one stretches the context by YaRN."""
    phases = [
        *("one.num_steps=3", "one.weights.code=0.68", "one.weights.math=0.32"),
        *("two.num_steps=4", "two.seq_length=32", "two.global_batch_size=8"),
        *("two.batch_ramp.start=4", "two.batch_ramp.increment=4", "two.batch_ramp.steps=2"),
        *("long.tokens.code=1024", "long.tokens.math=512", "long.seq_length=128"),
        *("long.global_batch_size=4", "long.rotary_scaling_factor=4.0"),
        "long.moe_router_bias_update_rate=0.0",
    ]
    return [
        *training,
        *("train.num_steps=10", "parallel=ep2", "checkpoint.interval_steps=2"),
        *("checkpoint.keep=null", "model.original_max_position_embeddings=32"),
        *(f"phases.{phase}" for phase in phases),
    ]


def test_a_phased_run_resumes_proves_itself_and_is_explained(
    words: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    succeed(on_ranks, 2, "pretrain", [*words, f"run_dir={whole}"])
    for stop in (2, 5, 8):
        stopped = [*words, f"run_dir={cut}", f"train.stop_after_step={stop}"]
        succeed(on_ranks, 2, "pretrain", stopped)
    succeed(on_ranks, 2, "pretrain", [*words, f"run_dir={cut}"])
    for name in ("metrics.jsonl", "ledger.jsonl", "validation.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    outcome = succeed(on_ranks, 1, "prove_mixture", [f"run={cut}", "sample=12"])
    assert "all agree with the plan" in outcome.stdout
    assert 'after 12 samples: {"one": {"code": 512, "math": 256}}' in outcome.stdout

    last = json.loads((whole / "ledger.jsonl").read_text().splitlines()[-1])
    assert last["tokens"]["long"] == {"code": 1024, "math": 512}
    outcome = succeed(on_ranks, 1, "explain", [f"run={whole}", "sample=40", "text=true"])
    assert "sample 40: phase long, domain" in outcome.stdout
    assert ".jsonl" in outcome.stdout

    state = next(iter(sorted(cut.glob("checkpoints/*/train_state.json"))))
    record = json.loads(state.read_text())
    record["ledger"]["one"]["code"] += 1
    state.write_text(json.dumps(record))
    outcome = run_job(on_ranks, 1, "prove_mixture", [f"run={cut}"])
    assert outcome.status == 1
    assert f"{state.parent.name} after" in outcome.stdout
    assert "1 differ from the plan" in outcome.stdout


def test_build_index_prints_the_mixture_and_refuses_what_is_too_much(
    words: list[str], corpus: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    index = [*words, "parallel=single", f"run_dir={tmp_path}/run"]
    index.append(f"data.domains.spare.path={corpus}/math")
    index.append("data.domains.spare.weight=0")
    outcome = succeed(on_ranks, 1, "build_index", index)
    lines = [line.split() for line in outcome.stdout.splitlines()]
    assert ["one", "code", "512", "68.0000%"] in [line[:4] for line in lines]
    assert ["-", "spare", "0", "not", "read"] in lines
    assert not (tmp_path / "run").exists()
    outcome = run_job(on_ranks, 1, "build_index", [*index, "data.domains.math.max_tokens=600"])
    assert outcome.status == 2
    assert "data.domains.math.max_tokens=600, but the run would read" in outcome.stderr


def test_what_was_read_stays_and_the_export_has_the_phase_it_ended_in(
    words: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    succeed(on_ranks, 2, "pretrain", [*words, f"run_dir={run}", "train.stop_after_step=4"])
    before = {path.name for path in run.glob("checkpoints/*")}
    changed = [*words, f"run_dir={run}", "phases.one.weights.code=0.5"]
    outcome = run_job(on_ranks, 2, "pretrain", changed)
    assert outcome.status == 2
    assert (
        "of phase 'one', of which these changed: domains.code.share=25 (was 17)" in outcome.stderr
    )
    assert read_yaml(run / "config.yaml").phases["one"].weights["code"] == 0.68
    assert {path.name for path in run.glob("checkpoints/*")} == before
    ahead = ["phases.long.tokens.code=1536", "phases.long.tokens.math=0"]
    succeed(on_ranks, 2, "pretrain", [*words, f"run_dir={run}", *ahead])
    succeed(on_ranks, 1, "prove_mixture", [f"run={run}"])

    prompts, ids = tmp_path / "prompts.json", [[(7 * i) % 500 for i in range(100)]]
    prompts.write_text(json.dumps({"prompts": ids}))
    scored = {}
    for step in (4, 10):
        checkpoint = run / "checkpoints" / f"step_{step:08d}"
        folder = tmp_path / f"export_{step}"
        words_of = [f"checkpoint={checkpoint}", f"output={folder}", "precision=fp32"]
        succeed(on_ranks, 1, "export", words_of)
        config = json.loads((folder / "config.json").read_text())
        assert (config["rope_scaling"] is None) == (step == 4)
        output = tmp_path / f"scores_{step}.json"
        score = [f"hf_dir={folder}", f"prompts={prompts}", f"output={output}"]
        succeed(on_ranks, 1, "score", score)
        scored[step] = json.loads(output.read_text())["logprobs"][0]
    yarn = on_ranks(1, logprobs, tmp_path / "export_10", ids[0])[0]
    assert max(abs(a - b) for a, b in zip(yarn, scored[10], strict=True)) < SCORE_TOLERANCE
    plain = tmp_path / "plain"
    shutil.copytree(tmp_path / "export_10", plain)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "rope_scaling": None}))
    other = on_ranks(1, logprobs, plain, ids[0])[0]
    assert max(abs(a - b) for a, b in zip(other, yarn, strict=True)) > 100 * SCORE_TOLERANCE


def logprobs(folder: Path, ids: list[int]) -> list[float]:
    """Return the log-probability of each token after the first, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    )
    logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
