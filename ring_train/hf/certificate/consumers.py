"""Programs that compute from a folder, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ring_train.errors import UserError
from ring_train.hf.certificate.agreement import Scores
from ring_train.hf.certificate.conversations import CONVERSATIONS
from ring_train.hf.certificate.settings import POSITIONS
from ring_train.hf.certificate.tensors import wide
from ring_train.hf.config import read_json
from ring_train.hf.fp8 import SCALE_SUFFIX
from ring_train.hf.parts import SINGLE_NAME
from ring_train.hf.shards import INDEX_NAME, read_stored
from ring_train.storage.safetensors import read_tensor

PIECES = (1, 63, 2, 64, 1, 1, 70)
"""Tokens of the pieces of a prefill; they begin and end inside and at the end of a chunk of 64."""
ONE_BY_ONE_TOKENS = 70
"""Longer rows are not read token by token."""
PROBE = Path(__file__).parent / "probe.py"
NUM_LINES = 3
"""Of a failed program's last words."""

Rows = Sequence[Sequence[int]]


class ConsumerError(UserError):
    """A program could not load the folder or compute from it."""


def request_of(rows: Rows, answers: Rows) -> dict[str, Any]:
    """Return what `probe` is asked: rows in every way, the trainer's answers in one pass."""
    return {
        "rows": [list(row) for row in rows],
        "answers": [list(row) for row in answers],
        "pieces": PIECES,
        "one_by_one": ONE_BY_ONE_TOKENS,
        "positions": POSITIONS,
        "conversations": CONVERSATIONS,
    }


def run_transformers(folder: Path, rows: Rows, answers: Rows) -> dict[str, Any]:
    """Return what transformers computes from a folder, by the folder's own modeling files.

    They run in a child process that is told to stay offline and has an own cache of modules. A
    block-FP8 folder is loaded from a copy in fp32: transformers has no such arithmetic on a CPU.

    Raises:
        ConsumerError: with the last words of the child.
    """
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": f"{scratch}/modules",
            "HF_HOME": f"{scratch}/home",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if "quantization_config" in read_json(folder / "config.json"):
            folder = dequantized_copy(folder, Path(scratch) / folder.resolve().name)
        words = [sys.executable, str(PROBE), str(folder.resolve())]
        return _ask(words, ("", ""), request_of(rows, answers), Path(scratch), environment)


def run_vllm(python: str, folder: Path, rows: Rows, *options: str) -> Scores:
    """Return the log-probabilities of rows by vLLM, in the environment of another Python.

    Args:
        python: of an environment with vLLM and tools/vllm_ring_linear.
        folder: Hugging Face folder; its config class is run where vLLM has none of its own.
        rows: token ids.
        options: of `ring_linear_vllm.score`.

    Raises:
        ConsumerError: with the last words of the child.
    """
    with tempfile.TemporaryDirectory() as scratch:
        words = [python, "-m", "ring_linear_vllm.score", "--model", str(folder.resolve())]
        words += ["--trust-remote-code", *options]
        environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
        request = {"prompts": [list(row) for row in rows]}
        answer = _ask(words, ("--prompts", "--output"), request, Path(scratch), environment)
        return answer["logprobs"]


def dequantized_copy(folder: Path, copy: Path) -> Path:
    """Return a copy of a block-FP8 folder whose weights are the fp32 values that it stands for."""
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX_NAME:
            shutil.copyfile(path, copy / path.name)
    config = read_json(folder / "config.json")
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    values = {name: read_tensor(stored) for name, stored in read_stored(folder).items()}
    names = [name for name in values if not name.endswith(SCALE_SUFFIX)]
    save_file({name: wide(values, name) for name in names}, copy / SINGLE_NAME, {"format": "pt"})
    return copy


def _ask(
    words: list[str],
    options: tuple[str, ...],
    request: dict[str, Any],
    scratch: Path,
    environment: dict[str, str],
) -> dict[str, Any]:
    """Return the JSON that a child answers to a request; both go through files."""
    files = [scratch / "request.json", scratch / "answer.json"]
    files[0].write_text(json.dumps(request), encoding="utf-8")
    names = [str(path) for path in files]
    words = words + [word for pair in zip(options, names, strict=True) for word in pair if word]
    # A child that is no rank of this job must not see the ranks of this job.
    inherited = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    try:
        done = subprocess.run(
            words,
            check=False,
            capture_output=True,
            text=True,
            env={**inherited, **environment},
            cwd=scratch,
            stdin=subprocess.DEVNULL,
        )
    except OSError as error:
        raise ConsumerError(f"{words[0]} cannot be started ({error})") from None
    if done.returncode != 0 or not files[1].is_file():
        last = " | ".join(done.stderr.strip().splitlines()[-NUM_LINES:])
        raise ConsumerError(f"exit status {done.returncode}: {last}")
    return json.loads(files[1].read_text(encoding="utf-8"))


RANK_VARIABLES = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
)
