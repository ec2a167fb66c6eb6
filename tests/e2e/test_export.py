"""An export says what the trainer says, in one pass and token by token, and writes text."""

import json
from pathlib import Path

import pytest

from tests.conftest import OnRanks
from tests.e2e.commands import contents, run_job, succeed

LOGPROB_TOLERANCE = 1e-4
"""Of the issue; two implementations in fp32 differ by about 1e-5."""
PARTS = (slice(0, 3), slice(20, 60), slice(200, 290))
"""Of held-out text; the longest spans chunks of lightning attention."""


@pytest.fixture
def prompts(corpus: Path, tmp_path: Path) -> list[list[int]]:
    """Held-out text of both domains, also in a file."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{corpus}/tokenizer/tokenizer.json")
    text = "".join(
        json.loads(line)["text"]
        for name in ("math_valid", "code_valid")
        for line in (corpus / f"{name}.jsonl").read_text().splitlines()[:4]
    )
    ids = tokenizer.encode(text).ids
    rows = [ids[part] for part in PARTS]
    assert [len(row) for row in rows] == [3, 40, 90]
    (tmp_path / "prompts.json").write_text(json.dumps({"prompts": rows}))
    return rows


def test_transformers_gives_the_logprobs_of_the_trainer(
    exported: Path, prompts: list[list[int]], on_ranks: OnRanks, tmp_path: Path
) -> None:
    import torch

    from tests.unit.hf.test_modeling import HEADS, load, target_logprobs

    output = tmp_path / "scores.json"
    words = [f"hf_dir={exported}", f"prompts={tmp_path}/prompts.json", f"output={output}"]
    succeed(on_ranks, 1, "score", words)
    scores = json.loads(output.read_text())
    model = load(exported)

    def assert_close(got: torch.Tensor, wanted: list[float], what: str) -> None:
        difference = float((got - torch.tensor(wanted)).abs().max())
        assert difference < LOGPROB_TOLERANCE, f"{what} of {len(wanted)}: {difference}"

    with torch.no_grad():
        for number, row in enumerate(prompts):
            ids = torch.tensor([row])
            for key, logprobs in HEADS.items():
                assert_close(logprobs(model, ids), scores[key][number], key)
            steps, cache = [], None
            for token in ids.split(1, dim=1):
                out = model(token, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits)
            one_by_one = target_logprobs(torch.cat(steps, dim=1), ids, 1)
            assert_close(one_by_one, scores["logprobs"][number], "token by token")


def test_generate_continues_a_prompt(exported: Path, on_ranks: OnRanks) -> None:
    words = [f"hf_dir={exported}", "prompt='12 + 7 = '", "max_new_tokens=16", "temperature=0"]
    outcome = succeed(on_ranks, 1, "generate", words)
    assert outcome.stdout.startswith("12 + 7 = ")
    assert len(outcome.stdout) > len("12 + 7 = \n")


def test_precision_and_checkpoint_can_be_chosen(
    trained: Path, exported: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    step = trained / "checkpoints" / "step_00000008"
    outcome = succeed(on_ranks, 1, "export", [f"checkpoint={step}", f"output={tmp_path}/bf16"])
    assert outcome.stdout == f"exported {step} to {tmp_path}/bf16\n"
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    (half,), (full,) = (
        [load_file(path) for path in folder.glob("*.safetensors")]
        for folder in (tmp_path / "bf16", exported)
    )
    assert half.keys() == full.keys()
    for name, tensor in half.items():
        wanted = torch.float32 if name.endswith("expert_bias") else torch.bfloat16
        assert tensor.dtype == wanted, name
        assert torch.equal(tensor, full[name].to(wanted)), name


@pytest.mark.parametrize("layout", ["tp2", "pp2", "ep2"])
def test_a_folder_through_a_sharded_checkpoint_is_the_same_folder(
    layout: str, exported: Path, training: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "out"
    # A step too small to change a weight, and none for the biases of experts.
    standstill = ["optim.lr=1e-30", "optim.min_lr=0", "model.moe_router_bias_update_rate=0"]
    words = [*training, *standstill, f"parallel={layout}", f"init_from={exported}"]
    words += [f"run_dir={run_dir}", "train.stop_after_step=1"]
    succeed(on_ranks, 2, "pretrain", words)
    words = [f"checkpoint={run_dir}", f"output={output}", "precision=fp32"]
    succeed(on_ranks, 2, "export", words)  # ranks of another job share the files
    assert contents(output) == contents(exported)


def test_a_rule_that_contradicts_the_checkpoint_is_refused(
    trained: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    words = [f"checkpoint={trained}", f"output={tmp_path}/out", "decay_layer_rule=shifted"]
    outcome = run_job(on_ranks, 1, "export", words)
    assert outcome.status == 2
    assert "trained with model.decay_layer_rule=zero_based" in outcome.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["step_00000099", "step_00000008/hf"])
def test_an_output_among_checkpoints_is_refused(
    place: str, trained: Path, on_ranks: OnRanks
) -> None:
    output = trained / "checkpoints" / place
    outcome = run_job(on_ranks, 1, "export", [f"checkpoint={trained}", f"output={output}"])
    assert outcome.status == 2
    assert "choose a path outside" in outcome.stderr
    assert not output.exists()


def test_an_existing_folder_is_left_alone(trained: Path, exported: Path, on_ranks: OnRanks) -> None:
    before = contents(exported)
    outcome = run_job(on_ranks, 1, "export", [f"checkpoint={trained}", f"output={exported}"])
    assert outcome.status == 2
    assert "is not empty" in outcome.stderr
    assert contents(exported) == before
    assert not list(exported.parent.glob(".*partial*"))
