"""Exported folders in transformers 4.57: the tests of the modeling files, and the trainer's scores.

Run by `make test-hf457` in an environment without ring_train. With --hf-dir, --prompts and --scores
a folder that the trainer exported is held to what the trainer's own model says about it.
"""

import json
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.unit.hf.test_modeling", "tests.unit.hf.test_modeling_options")

import torch  # noqa: E402
import transformers  # noqa: E402

from tests.unit.hf.test_modeling import *  # noqa: E402, F403  (its tests run here again)
from tests.unit.hf.test_modeling import GOLDEN, load, make_folder, target_logprobs  # noqa: E402
from tests.unit.hf.test_modeling_options import *  # noqa: E402, F403

TRAINER_ABSOLUTE = 1e-4


@pytest.fixture
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict, dict]:
    """(folder, prompts, scores) of the options, or of a golden folder."""
    options = [request.config.getoption(name) for name in ("--hf-dir", "--prompts", "--scores")]
    if not any(options):
        expected = json.loads((GOLDEN / "ring_linear_v2" / "expected.json").read_text())
        return make_folder(tmp_path / "ring", "ring_linear_v2", "zero_based"), expected, expected
    assert all(options), "--hf-dir, --prompts and --scores go together"
    folder, prompts, scores = map(Path, options)
    return folder, json.loads(prompts.read_text()), json.loads(scores.read_text())


def test_this_is_transformers_4_57() -> None:
    assert transformers.__version__.startswith("4.57.")


@torch.no_grad()
def test_logprobs_are_the_trainers_in_one_pass_and_token_by_token(
    exported: tuple[Path, dict, dict],
) -> None:
    folder, prompts, scores = exported
    model = load(folder)
    for row, wanted in zip(prompts["prompts"], scores["logprobs"], strict=True):
        ids = torch.tensor([row])
        steps, cache = [], None
        for token in ids.split(1, dim=1):
            out = model(token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        for logits in (model(ids).logits, torch.cat(steps, dim=1)):
            got = target_logprobs(logits, ids, 1)
            torch.testing.assert_close(got, torch.tensor(wanted), atol=TRAINER_ABSOLUTE, rtol=0)
