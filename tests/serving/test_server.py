"""The server answers an OpenAI chat request with what the engine computes."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ring_linear_vllm.engine import prompt_logprobs
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams, TokensPrompt

ABSOLUTE = 1e-4
"""In fp32: the server batches and schedules for itself."""
START_S = 300
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}{% endfor %}"
)
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hybrid with a chat template."""
    copy = Path(shutil.copytree(folders["shifted"], tmp_path_factory.mktemp("chat") / "hybrid"))
    (copy / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return copy


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Where a server of the folder listens: on this machine only."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(folder), "--served-model-name", "hybrid", "--dtype", "float32", "--enforce-eager"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128"]
    command = [sys.executable, "-m", "ring_linear_vllm.serve", *words]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = folder.parent / "server.log"
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment) as server,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"the server does not answer:\n{log.read_text()[-4000:]}")


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def test_a_chat_request_is_answered_as_the_engine_computes(
    address: str, folder: Path, engine_of: Callable[..., LLM]
) -> None:
    body = {"model": "hybrid", "messages": MESSAGES, "temperature": 0, "max_tokens": NUM_TOKENS}
    body |= {"ignore_eos": True, "logprobs": True, "return_token_ids": True}
    reply = post(f"{address}/v1/chat/completions", body)
    choice = reply["choices"][0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    assert reply["prompt_token_ids"] == prompt
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]

    engine = engine_of("shifted")
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    output = engine.generate(TokensPrompt(prompt_token_ids=prompt), greedy, use_tqdm=False)
    assert choice["token_ids"] == list(output[0].outputs[0].token_ids)

    wanted = prompt_logprobs(engine, [prompt + choice["token_ids"]])[0][-NUM_TOKENS:]
    got = [token["logprob"] for token in choice["logprobs"]["content"]]
    assert got == pytest.approx(wanted, abs=ABSOLUTE)
