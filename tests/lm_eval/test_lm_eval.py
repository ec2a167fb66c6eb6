"""lm-evaluation-harness on an exported folder, with local data: its figures are the trainer's.

Run by `make test-lm-eval`, which names the program of an environment of its own in LM_EVAL; the
library is imported nowhere here. HF_DIR names another folder than a golden one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ring_train.hf.prompts import PromptTokenizer
from tests.conftest import OnRanks
from tests.e2e.commands import succeed
from tests.unit.hf.test_modeling import make_folder

ROOT = Path(__file__).resolve().parents[2]
TASK = "ring_addition"
SUM_TOLERANCE = 1e-3
"""Of the sum of an answer's log-probabilities: ten tokens of 1e-4 each."""
NUM_PROBLEMS, NUM_CHOICES = 40, 4

pytestmark = pytest.mark.skipif(
    "LM_EVAL" not in os.environ, reason="make test-lm-eval sets LM_EVAL"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    given = os.environ.get("HF_DIR")
    if given is not None:
        return Path(given)
    return make_folder(tmp_path / "export", "ring_linear_v2", "zero_based")


def run_lm_eval(folder: Path, scratch: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return (figures of the task, its samples) for a folder, on the CPU, offline."""
    program = Path(os.environ["LM_EVAL"]).absolute()
    words = [
        *(str(program), "--model", "hf", "--device", "cpu", "--batch_size", "8"),
        *("--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32"),
        *("--tasks", TASK, "--include_path", "tests/lm_eval"),
        *("--output_path", str(scratch / "out"), "--log_samples"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(scratch / "home")}
    done = subprocess.run(
        words, check=False, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **offline}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (scratch / "out").rglob("results_*.json")
    (samples,) = (scratch / "out").rglob(f"samples_{TASK}_*.jsonl")
    figures = json.loads(results.read_text())["results"][TASK]
    return figures, [json.loads(line) for line in samples.read_text().splitlines()]


def test_lm_eval_says_what_the_trainer_says(
    folder: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    figures, samples = run_lm_eval(folder, tmp_path)
    assert len(samples) == NUM_PROBLEMS
    prompts, lengths, said = [], [], []
    tokenizer = PromptTokenizer(folder)
    for sample in samples:
        for choice, (response,) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            context = tokenizer.text_prompt(sample["doc"]["problem"]).ids
            whole = tokenizer.text_prompt(f"{sample['doc']['problem']} {choice}").ids
            assert whole[: len(context)] == context
            prompts.append(whole)
            lengths.append(len(whole) - len(context))
            said.append(float(response[0]))
    assert len(prompts) == NUM_PROBLEMS * NUM_CHOICES
    (tmp_path / "prompts.json").write_text(json.dumps({"prompts": prompts}))
    words = [f"hf_dir={folder}", f"prompts={tmp_path}/prompts.json", f"output={tmp_path}/s.json"]
    succeed(on_ranks, 1, "score", words)
    scores = json.loads((tmp_path / "s.json").read_text())["logprobs"]
    trainer = [sum(row[-length:]) for row, length in zip(scores, lengths, strict=True)]
    assert trainer == pytest.approx(said, abs=SUM_TOLERANCE)
    assert figures["acc,none"] == pytest.approx(accuracy(samples, trainer))
    apart = max(abs(one - other) for one, other in zip(trainer, said, strict=True))
    sys.stderr.write(f"accuracy {figures['acc,none']:.3f}, largest difference {apart:.1e}\n")


def accuracy(samples: list[dict[str, Any]], scores: list[float]) -> float:
    """Return the fraction of problems whose right choice has the largest score."""
    rows = [scores[i : i + NUM_CHOICES] for i in range(0, len(scores), NUM_CHOICES)]
    right = [row.index(max(row)) == s["doc"]["label"] for row, s in zip(rows, samples, strict=True)]
    return sum(right) / len(right)
