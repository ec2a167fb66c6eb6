"""What transformers computes from a folder: `python probe.py FOLDER REQUEST ANSWER`.

Runs the folder's own Python files, so it runs in a process of its own that can reach neither the
network nor another folder's modules; see `consumers`. Imports torch and transformers only and runs
in any environment that has them: also without ring_train.

REQUEST is JSON: `rows` [[ids]], `answers` [[ids]] that are read in one pass only, `pieces` (tokens
of the pieces of a prefill, over and over), `one_by_one` (tokens of the rows that are also read one
by one, at most), `positions` for the rope table, `conversations` [{messages, arguments}].
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = {torch.float32: "F32", torch.bfloat16: "BF16"}


@torch.no_grad()
def probe(folder: str | Path, request: dict[str, Any]) -> dict[str, Any]:
    """Return log-probabilities, decay rates, rope table, biases and rendered conversations."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=True,
        use_safetensors=True,
        dtype="auto",
        output_loading_info=True,
    )
    answer: dict[str, Any] = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "loading": {key: sorted(map(str, report[key])) for key in LOADING},
        "biases": dict(_biases(model)),
    }
    model = model.float().eval()
    rows = [torch.tensor([row]) for row in request["rows"]]
    answer |= _one_pass(model, rows)
    answer["answers"] = _one_pass(model, [torch.tensor([ids]) for ids in request["answers"]])
    short = {str(i): row for i, row in enumerate(rows) if row.shape[1] <= request["one_by_one"]}
    answer["one_by_one"] = {
        index: _in_pieces(model, row, itertools.repeat(1)) for index, row in short.items()
    }
    answer["in_pieces"] = [
        _in_pieces(model, row, itertools.cycle(request["pieces"])) for row in rows
    ]
    answer["padded"] = _padded(model, short)
    answer["slopes"] = dict(_slopes(model))
    if hasattr(model.model, "rope_table"):
        answer["rope"] = _rope_table(model, request["positions"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        answer["conversations"] = [_rendered(tokenizer, item) for item in request["conversations"]]
    except Exception as error:  # whatever a damaged file makes of transformers
        first = (str(error).strip().splitlines() or [""])[0]
        answer["tokenizer_fault"] = f"transformers cannot use it: {type(error).__name__}: {first}"
    return answer


PADDING_TOKENS = 3
"""Before the longest row of a padded batch."""
LOADING = ("missing_keys", "unexpected_keys", "mismatched_keys")


def _biases(model: Any) -> Iterator[tuple[str, dict[str, str]]]:
    for name, buffer in model.named_buffers():
        if name.endswith(".expert_bias"):
            header = f"{WORDS.get(buffer.dtype)} {list(buffer.shape)} ".encode()
            raw = buffer.contiguous().view(torch.uint8).numpy().tobytes()
            sha256 = hashlib.sha256(header + raw).hexdigest()
            yield name, {"dtype": str(buffer.dtype), "sha256": sha256}


def _one_pass(model: Any, rows: list[torch.Tensor]) -> dict[str, list[list[float]]]:
    """Return {"logprobs", "mtp_logprobs", "mtp_logprobs_2", ...} of each row alone."""
    result: dict[str, list[list[float]]] = {}
    for row in rows:
        result.setdefault("logprobs", []).append(_scores(model(row, use_cache=False).logits, row))
        if hasattr(model, "mtp_logits") and model.config.num_nextn_predict_layers:
            for depth, logits in enumerate(model.mtp_logits(row), start=1):
                key = "mtp_logprobs" if depth == 1 else f"mtp_logprobs_{depth}"
                result.setdefault(key, []).append(_scores(logits, row, 1 + depth))
    return result


def _scores(logits: torch.Tensor, row: torch.Tensor, shift: int = 1) -> list[float]:
    """Return the log-probability of the token `shift` places on, for logits [1, s, v]."""
    logprobs = logits[0, :-shift].float().log_softmax(-1)
    return logprobs.gather(-1, row[0, shift:, None])[:, 0].tolist()


def _in_pieces(model: Any, row: torch.Tensor, sizes: Iterable[int]) -> list[float]:
    """Return the log-probabilities of a row that is read in pieces, with the cache between."""
    logits, cache, start = [], None, 0
    for size in sizes:
        piece = row[:, start : start + size]
        if piece.shape[1] == 0:
            break
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
        start += size
    return _scores(torch.cat(logits, dim=1), row)


def _padded(model: Any, rows: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Return the log-probabilities of rows in one batch, each padded on the left."""
    length = max((row.shape[1] for row in rows.values()), default=1) + PADDING_TOKENS
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows.values()):
        ids[place, length - row.shape[1] :] = row
        mask[place, length - row.shape[1] :] = 1
    logits = model(ids, attention_mask=mask, use_cache=False).logits if rows else ids
    return {
        index: _scores(logits[place : place + 1, length - row.shape[1] :], row)
        for place, (index, row) in enumerate(rows.items())
    }


def _slopes(model: Any) -> Iterator[tuple[str, list[float]]]:
    for index, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if hasattr(module, "slopes"):
                yield str(index), [float(rate) for rate in module.slopes]


def _rope_table(model: Any, positions: list[int]) -> dict[str, list[list[float]]]:
    cos, sin = model.model.rope_table(torch.tensor([positions]), torch.float32)
    return {"cos": cos[0, 0].tolist(), "sin": sin[0, 0].tolist()}


def _rendered(tokenizer: Any, item: dict[str, Any]) -> dict[str, Any]:
    """Return text and ids of the generation prompt, text of the whole and ids of the rest."""
    messages, arguments = item["messages"], item["arguments"]
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True, **arguments
    )
    whole = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    return {
        "prompt": prompt,
        "prompt_ids": tokenizer.encode(prompt, add_special_tokens=False),
        "text": whole,
        "answer_ids": tokenizer.encode(whole[len(prompt) :], add_special_tokens=False),
    }


def main(folder: str, request: str, answer: str) -> None:
    """Answer the request in a file."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    result = probe(folder, json.loads(Path(request).read_text(encoding="utf-8")))
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
