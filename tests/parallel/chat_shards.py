"""Chat-like shards of tests: documents of a prompt that is not trained and an answer that is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_pipeline.shard_writer import write_shard
from tests.unit.data.shard_files import EOS, write_tokenizer


def write_chat_shard(prefix: Path, num_documents: int, seed: int) -> None:
    """Write random conversations of 6 to 30 tokens with their loss mask."""
    rng = np.random.default_rng(seed)
    documents, masks = [], []
    for _ in range(num_documents):
        prompt, answer = rng.integers(3, 15, 2)
        documents.append(np.append(rng.integers(0, EOS, prompt + answer - 1), EOS))
        masks.append(np.arange(prompt + answer) >= prompt)
    write_shard(prefix, documents, write_tokenizer(prefix.parent / "tokenizer"))
    mask = np.concatenate(masks).astype(np.uint8)
    Path(f"{prefix}.mask").write_bytes(mask.tobytes())
    manifest = Path(f"{prefix}.json")
    record = json.loads(manifest.read_text()) | {"mask_sha256": "of a test"}
    manifest.write_text(json.dumps(record))


def chat_words(folder: Path) -> list[str]:
    """Return the words of a run over chat shards `math` and `code`, written at the first call."""
    for seed, name in enumerate(("code", "math")):
        if not (folder / f"{name}.idx").exists():
            write_chat_shard(folder / name, 40, seed)
    return [
        *("data.packing=whole", f"data.tokenizer={folder}/tokenizer"),
        *(f"data.index_dir={folder}/index", f"run_dir={folder}/run"),
        *(f"data.domains.{name}.path={folder}/{name}" for name in ("code", "math")),
        *(f"model.eos_token_id={EOS}", f"model.pad_token_id={EOS}"),
        "model.moe_router_bias_update_rate=0",
    ]
