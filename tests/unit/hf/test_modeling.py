"""The modeling files that travel in an export, through transformers, against the golden vectors.

Also run on transformers 4.57 from tests/hf457, in an environment without ring_train: this module
imports neither ring_train nor a fixture of another file.
"""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

MODULES_CACHE = tempfile.mkdtemp(prefix="hf_modules_")
atexit.register(shutil.rmtree, MODULES_CACHE, ignore_errors=True)
os.environ.setdefault("HF_MODULES_CACHE", MODULES_CACHE)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402  (transformers reads the environment when it is imported)
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden"
MODELING = ROOT / "ring_train" / "hf" / "modeling"

# tests/golden/README.md, Tolerances.
NOISE_FLOORS = 5
LOSS_ABSOLUTE = 1e-5
GRAD_NORM_RELATIVE = 5e-5
GRAD_NORM_ABSOLUTE = 1e-6
FLOAT64_ABSOLUTE = 1e-9
# One pass and many are the same sums in another order.
SPLIT_ABSOLUTE = 1e-4
# Equal weights, but CPU kernels depend on where they lie in memory.
SAME_ABSOLUTE = 2e-5

CASES = {
    "ling_v2": ("ling_v2", None, "expected.json"),
    "ring_zero_based": ("ring_linear_v2", "zero_based", "expected.json"),
    "ring_shifted": ("ring_linear_v2", "shifted", "expected_hf_rule.json"),
    "ring_lite": ("ring_lite_v1", None, "expected.json"),
}
MODULES = {
    "ling_v2": ("_v2",),
    "ring_linear_v2": ("_v2", "_linear_v2"),
    "ring_lite_v1": ("_v2", ""),
}
"""Endings of the modeling files of a folder, its own last."""


@dataclass
class Case:
    folder: Path
    model: Any
    expected: dict[str, Any]

    @property
    def has_biases(self) -> bool:
        """Whether routers have an expert bias: not in the first generation."""
        return hasattr(self.model.config, "n_group")

    @property
    def prompts(self) -> list[torch.Tensor]:
        return [torch.tensor([ids]) for ids in self.expected["prompts"]]


def make_folder(destination: Path, name: str, rule: str | None) -> Path:
    """A golden folder as an export writes it: with modeling files, auto_map and decay rule."""
    shutil.copytree(GOLDEN / name, destination)
    for ending in MODULES[name]:
        for kind in ("configuration", "modeling"):
            shutil.copy(MODELING / f"{kind}_bailing_moe{ending}.py", destination)
    ending = MODULES[name][-1]
    word = "".join(part.capitalize() for part in ending.split("_"))
    edit_config(
        destination,
        auto_map={
            "AutoConfig": f"configuration_bailing_moe{ending}.BailingMoe{word}Config",
            "AutoModelForCausalLM": f"modeling_bailing_moe{ending}.BailingMoe{word}ForCausalLM",
        },
    )
    if rule is not None:
        edit_config(destination, decay_layer_rule=rule)
    return destination


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.chmod(0o644)
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def load(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=dtype, **kwargs
    )


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.set_num_threads(1)
    name, rule, expected = CASES[request.param]
    folder = make_folder(tmp_path_factory.mktemp("case") / request.param, name, rule)
    return Case(folder, load(folder), json.loads((GOLDEN / name / expected).read_text()))


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "ring", "ring_linear_v2", "zero_based")


def target_logprobs(logits: torch.Tensor, ids: torch.Tensor, shift: int) -> torch.Tensor:
    """Log-probability of the token `shift` places on, for logits [1, s, v] and ids [1, s]."""
    logprobs = logits[0, :-shift].log_softmax(-1)
    return logprobs.gather(-1, ids[0, shift:, None])[:, 0]


def main_logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return target_logprobs(model(ids).logits, ids, 1)


def mtp_logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    (logits,) = model.mtp_logits(ids)
    return target_logprobs(logits, ids, 2)


HEADS = {"logprobs": main_logprobs, "mtp_logprobs": mtp_logprobs}


def max_difference(
    model: Any, expected: dict[str, Any], prompts: list[list[int]], dtype: torch.dtype
) -> float:
    """Largest difference of any log-probability of either head from the expected ones."""
    differences = []
    with torch.no_grad():
        for key, head in HEADS.items():
            if key not in expected:
                assert model.mtp_logits(torch.tensor([prompts[0]])) == []
                continue
            for ids, wanted in zip(prompts, expected[key], strict=True):
                got = head(model, torch.tensor([ids]))
                differences.append((got - torch.tensor(wanted, dtype=dtype)).abs().max().item())
    return max(differences)


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=SAME_ABSOLUTE, rtol=0)


def assert_equal_states(got: Any, wanted: Any) -> None:
    states, expected = got.state_dict(), wanted.state_dict()
    assert states.keys() == expected.keys()
    assert all(torch.equal(states[name], expected[name]) for name in states)


def test_logprobs_of_both_heads_are_the_golden_ones(case: Case) -> None:
    tolerance = NOISE_FLOORS * case.expected["noise_floor"]
    expected = case.expected
    assert max_difference(case.model, expected, expected["prompts"], torch.float32) <= tolerance
    pair = expected["packed_pair"]
    assert max_difference(case.model, pair, pair["documents"], torch.float32) <= tolerance


def test_a_double_run_meets_the_golden_float64(case: Case) -> None:
    model = load(case.folder, torch.float64)
    expected = case.expected["float64"]
    prompts = case.expected["prompts"]
    assert max_difference(model, expected, prompts, torch.float64) <= FLOAT64_ABSOLUTE


@pytest.mark.parametrize(
    ("head", "loss_key", "norm_key"),
    [(main_logprobs, "loss", "grad_norms"), (mtp_logprobs, "mtp_loss", "mtp_grad_norms")],
)
def test_loss_and_gradient_norms_are_the_golden_ones(
    case: Case, head: Callable[..., torch.Tensor], loss_key: str, norm_key: str
) -> None:
    if loss_key not in case.expected:
        assert case.model.config.num_nextn_predict_layers == 0
        return
    logprobs = torch.cat([head(case.model, ids) for ids in case.prompts])
    loss = -logprobs.mean()
    case.model.zero_grad()
    loss.backward()
    norms = {
        name: parameter.grad.norm().item()
        for name, parameter in case.model.named_parameters()
        if parameter.grad is not None
    }
    case.model.zero_grad()
    assert loss.item() == pytest.approx(case.expected[loss_key], abs=LOSS_ABSOLUTE)
    # An expert that no token chose is not run here, and has norm 0 there.
    expected = case.expected[norm_key]
    norms = {**{name: 0.0 for name, norm in expected.items() if norm == 0}, **norms}
    assert norms == pytest.approx(expected, rel=GRAD_NORM_RELATIVE, abs=GRAD_NORM_ABSOLUTE)


def test_labels_give_the_mean_loss(case: Case) -> None:
    ids = case.prompts[1]
    with torch.no_grad():
        out = case.model(ids, labels=ids)
    assert out.loss.item() == pytest.approx(-main_logprobs(case.model, ids).mean().item(), abs=1e-5)


@pytest.mark.parametrize("pieces", [(1,) * 65, (3, 70, 1, 64, 5, 1, 1, 1, 4)])
def test_cached_pieces_equal_one_pass(case: Case, pieces: tuple[int, ...]) -> None:
    """Token by token, and in pieces that start and end inside a chunk."""
    (ids,) = (prompt for prompt in case.prompts if prompt.shape[1] == sum(pieces))
    logits, cache = [], None
    with torch.no_grad():
        for piece in ids.split(list(pieces), dim=1):
            out = case.model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        whole = case.model(ids, use_cache=False)
    assert whole.past_key_values is None
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, atol=SPLIT_ABSOLUTE, rtol=0)


def left_padded(rows: list[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of rows [1, s] and its attention mask."""
    length = max(row.shape[1] for row in rows)
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - row.shape[1] :] = row
        mask[index, length - row.shape[1] :] = 1
    return ids, mask


def test_left_padding_changes_nothing(case: Case) -> None:
    ids, mask = left_padded(case.prompts, pad=7)
    num_first = 140
    with torch.no_grad():
        whole = case.model(ids, attention_mask=mask).logits
        first = case.model(ids[:, :num_first], attention_mask=mask[:, :num_first], use_cache=True)
        rest = case.model(
            ids[:, num_first:], attention_mask=mask, past_key_values=first.past_key_values
        ).logits
        mtp = case.model.mtp_logits(ids, mask)
        for index, row in enumerate(case.prompts):
            num_tokens = row.shape[1]
            alone = case.model(row).logits[0]
            pairs = zip(mtp, case.model.mtp_logits(row), strict=True)
            for got, wanted in (
                (whole[index, -num_tokens:], alone),
                (rest[index], alone[-rest.shape[1] :]),
                *((a[index, -num_tokens:-1], b[0, :-1]) for a, b in pairs),
            ):
                torch.testing.assert_close(got, wanted, atol=SPLIT_ABSOLUTE, rtol=0)


def test_positions_count_real_tokens(case: Case) -> None:
    """No log-probability shows it: both attentions know distances only."""
    ids, mask = left_padded(case.prompts, pad=7)
    trunk = case.model.model
    step = trunk.make_step(trunk.word_embeddings(ids), mask, None, None)
    for index, row in enumerate(case.prompts):
        num_tokens = row.shape[1]
        cos, sin = trunk.rope_table(torch.arange(num_tokens)[None], torch.float32)
        assert torch.equal(step.cos[index, :, -num_tokens:], cos[0])
        assert torch.equal(step.sin[index, :, -num_tokens:], sin[0])


def test_a_mask_of_another_length_is_refused(case: Case) -> None:
    ids = case.prompts[0]
    with pytest.raises(ValueError, match=r"must be \[batch, 24\]: 0 cached and 24 new"):
        case.model(ids, attention_mask=torch.ones(1, 23))


GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 511}


def test_batched_generation_equals_one_row_at_a_time_without_cache(case: Case) -> None:
    ids, mask = left_padded(case.prompts, pad=511)
    batch = case.model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    for index, row in enumerate(case.prompts):
        ones = torch.ones_like(row)
        alone = case.model.generate(input_ids=row, attention_mask=ones, use_cache=False, **GREEDY)
        assert batch[index, ids.shape[1] :].tolist() == alone[0, row.shape[1] :].tolist()


def test_beam_search_moves_cache_rows(case: Case) -> None:
    ids = case.prompts[0]
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "num_beams": 3, **GREEDY}
    cached = case.model.generate(**arguments)
    assert cached.tolist() == case.model.generate(use_cache=False, **arguments).tolist()


def test_generation_continues_a_returned_cache(case: Case) -> None:
    ids = case.prompts[0]
    whole = case.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
    out = case.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        return_dict_in_generate=True,
        **{**GREEDY, "max_new_tokens": 5},
    )
    rest = case.model.generate(
        input_ids=out.sequences,
        attention_mask=torch.ones_like(out.sequences),
        past_key_values=out.past_key_values,
        **{**GREEDY, "max_new_tokens": 3},
    )
    assert rest.tolist() == whole.tolist()


def test_no_tensor_is_missing_or_left_over(case: Case) -> None:
    _, report = load(case.folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_bf16_keeps_router_bias_and_logits_in_fp32(case: Case) -> None:
    model = load(case.folder, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    biases = dict(model.named_buffers())
    assert bool(biases) == case.has_biases
    for name, bias in biases.items():
        assert name.endswith("mlp.gate.expert_bias")
        assert torch.equal(bias, case.model.get_buffer(name)), name
    assert model(case.prompts[0]).logits.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_leaves_the_router_bias_alone(case: Case, dtype: torch.dtype) -> None:
    model = load(case.folder).to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    biases = dict(model.named_buffers())
    assert bool(biases) == case.has_biases
    for name, bias in biases.items():
        assert torch.equal(bias, case.model.get_buffer(name)), name


def test_sampling_from_one_token_is_greedy_and_a_seed_repeats_itself(case: Case) -> None:
    ids, mask = left_padded(case.prompts, pad=511)
    inputs = {"input_ids": ids, "attention_mask": mask}
    greedy = case.model.generate(**inputs, **GREEDY)
    sampled = {**GREEDY, "do_sample": True}
    assert case.model.generate(**inputs, **sampled, top_k=1).tolist() == greedy.tolist()
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        drawn.append(case.model.generate(**inputs, **sampled, top_k=0, top_p=0.9).tolist())
    assert drawn[0] == drawn[1] != greedy.tolist()


def test_a_saved_model_loads_again_and_says_the_same(case: Case, tmp_path: Path) -> None:
    case.model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert_equal_states(again, case.model)
    ids = case.prompts[0]
    assert_same(again(ids).logits, case.model(ids).logits)


def test_a_deeper_mtp_layer_continues_the_first(ring: Path) -> None:
    """Two depths with equal weights: the second reads the first one's output and the next token."""
    model = load(ring)
    config = AutoConfig.from_pretrained(ring, trust_remote_code=True)
    config.num_nextn_predict_layers = 2
    deeper = type(model)(config)
    weights = model.state_dict()
    last = f"model.layers.{config.num_hidden_layers}."
    copies = {
        name.replace(last, f"model.layers.{config.num_hidden_layers + 1}."): tensor
        for name, tensor in weights.items()
        if name.startswith(last)
    }
    deeper.load_state_dict({**weights, **copies})
    ids = torch.arange(20)[None] * 7
    first, second = deeper.mtp_logits(ids)
    assert_same(first, model.mtp_logits(ids)[0])
    layer = model.model.layers[-1]
    trunk = model.model(ids, use_cache=False).last_hidden_state
    step = model.model.make_step(trunk, None, None, None)
    embed = model.model.word_embeddings
    rolled = torch.cat([ids[:, 1:], torch.zeros(1, 1, dtype=torch.int64)], dim=1)
    twice = torch.cat([ids[:, 2:], torch.zeros(1, 2, dtype=torch.int64)], dim=1)
    hidden = layer.predict(embed(twice), layer.predict(embed(rolled), trunk, step), step)
    assert_same(second, model.lm_head(hidden))
