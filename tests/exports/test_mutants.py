"""A certificate names every fault of tests/exports/mutants.py; all are put in, none is sampled.

WRITE_PAGE=1 writes what was found into docs/export.md.
"""

import atexit
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

MODULES_CACHE = tempfile.mkdtemp(prefix="hf_modules_")
atexit.register(shutil.rmtree, MODULES_CACHE, ignore_errors=True)
os.environ.setdefault("HF_MODULES_CACHE", MODULES_CACHE)

from ring_train.config import DecayLayerRule, ModelConfig, MtpExport, WeightFormat  # noqa: E402
from ring_train.hf.certificate.agreement import Tie  # noqa: E402
from ring_train.hf.certificate.computed import VLLM_WAYS, Reference  # noqa: E402
from ring_train.hf.certificate.consumers import (  # noqa: E402
    ConsumerError,
    Rows,
    request_of,
    run_transformers,
)
from ring_train.hf.certificate.settings import is_linear  # noqa: E402
from ring_train.hf.certificate.verify import Truth, verify  # noqa: E402
from ring_train.hf.config import read_model_config  # noqa: E402
from ring_train.hf.reader import open_hf_folder  # noqa: E402
from ring_train.hf.writer import HfFormat, write_hf_folder  # noqa: E402
from tests.conftest import OnRanks  # noqa: E402
from tests.exports.mutants import MUTANTS  # noqa: E402
from tests.exports.page import write_mutants  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
PAGE = ROOT / "docs" / "export.md"
BASES = {
    "linear": "ring_linear_v2",
    "softmax": "ling_v2",
    "yarn": "ring_linear_v2",
    "first": "ring_lite_v1",
}
YARN_CONTEXT_TOKENS = 64
ONE_BY_ONE_TOKENS = 24
"""Of the first row: seconds matter here."""


@dataclasses.dataclass
class Base:
    """A right folder, and what it has to mean."""

    folder: Path
    model: ModelConfig
    source: Path
    """Golden folder with the weights."""
    rows: list[list[int]]
    truth: Truth | None = None


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with the control tokens of chat, no larger than the golden vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [json.dumps({"text": f"{n} + {n} = {2 * n} def f{n}(): return"}) for n in range(50)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    words = [f"input={folder}/text.jsonl", f"output={folder}/out", "vocab_size=275"]
    line = [sys.executable, "-m", "data_pipeline.train_tokenizer", *words]
    done = subprocess.run(line, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.fixture(scope="module")
def bases(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    return {
        name: make_base(name, tokenizer, tmp_path_factory.mktemp(name) / "export") for name in BASES
    }


def make_base(name: str, tokenizer: Path, folder: Path) -> Base:
    """Write the right folder of a base."""
    source = GOLDEN / BASES[name]
    rule = DecayLayerRule.zero_based if "linear" in BASES[name] else None
    eos = json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in eos}
    model = dataclasses.replace(
        read_model_config(source, rule),
        eos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|startoftext|>"],
    )
    prompts = json.loads((source / "expected.json").read_text())["prompts"]
    rows = [prompts[0], prompts[1]]
    if name == "yarn":
        model.rotary_scaling_factor = 4.0
        model.original_max_position_embeddings = YARN_CONTEXT_TOKENS
        rows[1] = prompts[2][: YARN_CONTEXT_TOKENS + 36]
    with open_hf_folder(source, read_model_config(source, rule)) as reader:
        write_hf_folder(
            folder,
            model,
            reader.read_logical,
            form=HfFormat(weights=WeightFormat.fp32, max_shard_bytes=1_500_000),
            tokenizer_dir=tokenizer,
        )
    return Base(folder=folder, model=model, source=source, rows=rows)


def score(
    model: ModelConfig, source: Path, rows: list[list[int]], weights: WeightFormat
) -> Reference:
    """Return what the trainer computes from the golden weights; runs on a rank."""
    from ring_train.hf.certificate.tensors import as_exported
    from ring_train.jobs.reference_scores import score_reference

    whole = read_model_config(source, model.decay_layer_rule if is_linear(model) else None)
    with open_hf_folder(source, whole) as reader:
        return score_reference(model, as_exported(model, weights, reader.read_logical), rows)


def truth_of(base: Base, tokenizer: Path, on_ranks: OnRanks) -> Truth:
    """Return what a base has to mean; the trainer scores its rows once."""
    from ring_train.hf.certificate.conversations import CONVERSATIONS
    from ring_train.hf.training_turns import training_turns

    if base.truth is None:
        (reference,) = on_ranks(1, score, base.model, base.source, base.rows, WeightFormat.fp32)
        turns = training_turns(tokenizer, CONVERSATIONS, base.model.eos_token_id)
        assert not isinstance(turns, str), turns

        def read(name: str) -> Any:
            with open_hf_folder(base.source, base.model) as reader:
                return reader.read_logical(name)

        base.truth = Truth(
            source="golden",
            model=base.model,
            mtp=MtpExport.layer,
            read=read,
            reference=lambda folder, weights: reference,
            turns=turns,
            end_of_turn=turns[0].answer_ids[-1],
            tokenizer=tokenizer,
        )
    return base.truth


def run_here(folder: Path, rows: Rows, answers: Rows) -> dict[str, Any]:
    """Return what the probe answers, in this process."""
    from ring_train.hf.certificate.probe import probe

    try:
        request = {**request_of(rows, answers), "one_by_one": ONE_BY_ONE_TOKENS}
        return json.loads(json.dumps(probe(folder, request)))
    except Exception as error:
        raise ConsumerError(f"{type(error).__name__}: {error}") from error


def failed(certificate: dict[str, Any]) -> list[str]:
    checks = certificate["checks"]
    return [name for name, check in checks.items() if check["status"] == "failed"]


@pytest.mark.parametrize("name", BASES)
def test_a_right_folder_passes(
    name: str, bases: dict[str, Base], tokenizer: Path, on_ranks: OnRanks
) -> None:
    base = bases[name]
    truth = truth_of(base, tokenizer, on_ranks)
    certificate = verify(base.folder, truth, transformers=run_here)
    assert certificate["passed"], certificate["report"]
    not_run = {key for key, check in certificate["checks"].items() if check["status"] == "not run"}
    assert not_run == VLLM_WAYS.keys()


FORMS = {
    "bf16": HfFormat(weights=WeightFormat.bf16),
    "fp8": HfFormat(weights=WeightFormat.fp8),
    "separate_mtp": HfFormat(weights=WeightFormat.fp32, mtp=MtpExport.separate),
    "no_mtp": HfFormat(weights=WeightFormat.fp32, mtp=MtpExport.none),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_folder_passes_and_its_faults_do_not(
    name: str, bases: dict[str, Base], tokenizer: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    base, form = bases["linear"], FORMS[name]
    rounded = truth_of(base, tokenizer, on_ranks)
    model = base.model
    if form.mtp is MtpExport.none:
        model = dataclasses.replace(model, mtp_num_layers=0)
    assert rounded.read is not None
    write_hf_folder(tmp_path / "x", model, rounded.read, form=form, tokenizer_dir=tokenizer)
    (reference,) = on_ranks(1, score, model, base.source, base.rows, form.weights)
    truth = dataclasses.replace(
        rounded, model=model, mtp=form.mtp, reference=lambda folder, weights: reference
    )
    here = run_transformers if form.weights is WeightFormat.fp8 else run_here
    certificate = verify(tmp_path / "x", truth, transformers=here)
    assert certificate["passed"], certificate["report"]
    MUTANTS["gate_up_swapped"].change(tmp_path / "x")
    certificate = verify(tmp_path / "x", truth, transformers=here)
    assert {"weights", "transformers_one_pass"} <= set(failed(certificate))


def score_without_preference(model: ModelConfig, source: Path, rows: list[list[int]]) -> Reference:
    """Return what the trainer computes where no router prefers any expert; runs on a rank."""
    from ring_train.jobs.reference_scores import score_reference

    with open_hf_folder(source, model) as reader:

        def read(name: str) -> Any:
            tensor = reader.read_logical(name)
            return torch.zeros_like(tensor) if ".router." in name else tensor

        return score_reference(model, read, rows, itertools.count(1))


def test_where_routing_ties_leave_nothing_to_compare_no_certificate_is_given(
    bases: dict[str, Base], tokenizer: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    base = bases["softmax"]
    truth = truth_of(base, tokenizer, on_ranks)
    rows = [row[:30] for row in base.rows]
    (tied,) = on_ranks(1, score_without_preference, base.model, base.source, rows)
    assert all(tie.token == 0 for ties in tied.ties.values() for tie in ties)
    clear = truth.reference(base.folder, WeightFormat.fp32)
    reference = dataclasses.replace(
        clear,
        ties={key: [Tie(token=0, margin=0.0)] * len(base.rows) for key in clear.scores},
    )
    truth = dataclasses.replace(truth, reference=lambda folder, weights: reference)
    assert verify(base.folder, truth, transformers=run_here)["passed"]
    folder = tmp_path / "x"
    shutil.copytree(base.folder, folder)
    MUTANTS["groups_by_best"].change(folder)
    certificate = verify(folder, truth, transformers=run_here)
    one_pass = certificate["checks"]["transformers_one_pass"]
    assert one_pass["status"] == "not run"
    assert "routing ties leave 0 of" in one_pass["reason"]
    assert not certificate["passed"]


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, list[str]]]:
    """Checks that failed, by mutant."""
    failures: dict[str, list[str]] = {}
    yield failures
    if os.environ.get("WRITE_PAGE") and failures.keys() == MUTANTS.keys():
        write_mutants(PAGE, [(MUTANTS[name].fault, checks) for name, checks in failures.items()])


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_named(
    name: str,
    bases: dict[str, Base],
    tokenizer: Path,
    found: dict[str, list[str]],
    on_ranks: OnRanks,
    tmp_path: Path,
) -> None:
    mutant = MUTANTS[name]
    base = bases[mutant.base]
    folder = tmp_path / name
    shutil.copytree(base.folder, folder)
    mutant.change(folder)
    truth = truth_of(base, tokenizer, on_ranks)
    certificate = verify(folder, truth, transformers=run_here)
    found[name] = failed(certificate)
    assert not certificate["passed"]
    assert mutant.noticed_by in found[name], certificate["report"]
