"""Adapters from the command line: trained, resumed, merged, and loaded by PEFT."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.e2e.commands import Outcome, contents, run_job, succeed
from tests.e2e.conftest import NUM_STEPS, made_once

LOGPROB_TOLERANCE = 1e-4
"""Two implementations in fp32, see test_export."""
MERGED_TOLERANCE = 1e-5
"""One implementation: W x + s B (A x) against (W + s B A) x, in fp32."""
PROMPTS = [[5, 17, 3], list(range(3, 60)), [7 * i % 300 for i in range(90)]]


@pytest.fixture
def adapting(training: list[str], exported: Path) -> list[str]:
    """Words of a run of adapters on the export, all but its run_dir."""
    return [
        *training,
        *("lora=all", "lora.rank=4", "lora.alpha=6", f"init_from={exported}"),
        *("model.moe_router_bias_update_rate=0", "optim.lr=1e-2"),
        "parallel=ep2",
    ]


@pytest.fixture
def adapted(shared: Path, adapting: list[str], on_ranks: OnRanks) -> Path:
    """The folder of an uninterrupted run of adapters on two ranks that share the experts."""
    folder = shared / "adapted"
    words = [*adapting, f"run_dir={folder}"]
    return made_once(folder, lambda: succeed(on_ranks, 2, "pretrain", words))


@pytest.fixture
def merged(shared: Path, adapted: Path, on_ranks: OnRanks) -> Path:
    """The fp32 export of that run, whose adapters are merged unless something else is asked."""
    folder = shared / "merged"
    words = [f"checkpoint={adapted}", f"output={folder}", "precision=fp32"]
    return made_once(folder, lambda: succeed(on_ranks, 1, "export", words))


@pytest.fixture
def separate(shared: Path, adapted: Path, on_ranks: OnRanks) -> Path:
    """The adapters of that run in fp32."""
    folder = shared / "separate"
    words = [f"checkpoint={adapted}", f"output={folder}", "precision=fp32", "adapter=separate"]
    return made_once(folder, lambda: succeed(on_ranks, 1, "export", words))


def last_validation(run: Path) -> float:
    """Return the mean held-out loss of both domains at the end of a run."""
    record = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])
    assert record["step"] == NUM_STEPS
    return (record["valid_loss/code"] + record["valid_loss/math"]) / 2


def test_adapters_learn_and_their_run_resumes(
    trained: Path, adapted: Path, adapting: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    base, learnt = (last_validation(run) for run in (trained, adapted))
    assert learnt < base - 0.05
    lines = (adapted / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == NUM_STEPS
    shutil.copytree(adapted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{NUM_STEPS:08d}")
    succeed(on_ranks, 2, "pretrain", [*adapting, f"run_dir={tmp_path}/run"])
    assert (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() == lines
    outcomes = [
        succeed(on_ranks, 1, "verify_checkpoint", [f"folder={folder}"]).stdout
        for folder in (adapted, tmp_path / "run")
    ]
    digests = [re.findall(r"\w+  \S+\.lora_[ab]", text) for text in outcomes]
    assert digests[0] == digests[1]
    assert digests[0]


def trainer_scores(run: Path) -> dict[str, Any]:
    """Return the scores of PROMPTS under the checkpoint of a run, adapters beside the weights."""
    from ring_train.checkpoint import find_checkpoint
    from ring_train.checkpoint.checkpointer import load_weights
    from ring_train.config import ParallelConfig, ScoreConfig, read_yaml
    from ring_train.jobs.score import score_plan
    from ring_train.model.build import build_model
    from ring_train.plan import make_plan
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import attach_schedule_callbacks
    from ring_train.train.scoring import make_rows, score_rows

    saved = read_yaml(run / "config.yaml")
    unread = ScoreConfig(hf_dir="", prompts="", output="", parallel=ParallelConfig())
    config = score_plan(unread, saved.model, PROMPTS).config
    config = dataclasses.replace(config, lora=saved.lora, init_from=saved.init_from)
    plan = make_plan(config, 1)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        load_weights(find_checkpoint(run, "run"), model, plan, groups.collection)
        attach_schedule_callbacks(model, None, groups.collection)
        rows = make_rows(plan, PROMPTS, 0, packed=False)
        return score_rows(model, rows, PROMPTS, groups, packed=False)


def test_merged_weights_say_what_trainer_and_peft_say(
    adapted: Path, exported: Path, merged: Path, separate: Path, on_ranks: OnRanks
) -> None:
    import torch
    from peft import PeftModel
    from safetensors import safe_open

    from tests.unit.hf.test_modeling import HEADS, load

    scores = on_ranks(1, trainer_scores, adapted)[0]
    base, whole = load(exported), load(merged)
    with torch.no_grad():
        before = HEADS["logprobs"](base, torch.tensor([PROMPTS[1]]))
        peft = PeftModel.from_pretrained(base, separate)
        beside = peft.base_model.model
        for number, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            for key, logprobs in HEADS.items():
                got = logprobs(whole, ids)
                torch.testing.assert_close(
                    logprobs(beside, ids), got, atol=MERGED_TOLERANCE, rtol=0
                )
                wanted = torch.tensor(scores[key][number])
                torch.testing.assert_close(got, wanted, atol=LOGPROB_TOLERANCE, rtol=0)
        after = HEADS["logprobs"](whole, torch.tensor([PROMPTS[1]]))
    assert (after - before).abs().max() > 0.1, "adapters that do nothing prove nothing"
    with safe_open(separate / "adapter_model.safetensors", framework="pt") as written:
        names = list(written.keys())
        stored = {name: written.get_slice(name).get_shape() for name in names}
    loaded = {
        name.replace(".default", ""): list(tensor.shape)
        for name, tensor in peft.state_dict().items()
        if "lora_" in name
    }
    assert loaded == stored


def test_a_folder_of_adapters_says_what_they_belong_to(exported: Path, separate: Path) -> None:
    assert sorted(contents(separate)) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((separate / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 6)
    assert config["base_model_name_or_path"] == str(exported)
    pattern = config["target_modules"]
    assert re.fullmatch(pattern, "model.layers.3.mlp.experts.7.up_proj")
    assert re.fullmatch(pattern, "model.layers.0.attention.g_proj")
    for other in ("lm_head", "model.layers.1.mlp.gate", "model.layers.5.attention.dense"):
        assert not re.fullmatch(pattern, other)


def export(on_ranks: OnRanks, checkpoint: Path, output: Path, *words: str) -> Outcome:
    """Run an export that must be refused, and leave nothing."""
    outcome = run_job(
        on_ranks, 1, "export", [f"checkpoint={checkpoint}", f"output={output}", *words]
    )
    assert outcome.status == 2, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not output.exists()
    assert not list(output.parent.glob(".*partial*"))
    return outcome


def test_adapters_are_not_written_for_other_weights(
    adapted: Path, merged: Path, trained: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    separate = "adapter=separate"
    outcome = export(on_ranks, adapted, output, separate, f"base_model={merged}")
    assert "differs from the weight that the adapters were trained beside" in outcome.stderr
    outcome = export(on_ranks, adapted, output, separate, f"base_model={trained}")
    assert f"base_model={trained} is no Hugging Face folder" in outcome.stderr
    outcome = export(on_ranks, adapted, output, f"base_model={merged}")
    assert "add adapter=separate" in outcome.stderr
    outcome = export(on_ranks, trained, output, "adapter=merged")
    assert "was trained without adapters (lora.rank=null)" in outcome.stderr
    shutil.copytree(merged, tmp_path / "stretched")
    path = tmp_path / "stretched" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_theta": 7}))
    outcome = export(on_ranks, adapted, output, separate, f"base_model={tmp_path}/stretched")
    assert "another position embedding" in outcome.stderr
