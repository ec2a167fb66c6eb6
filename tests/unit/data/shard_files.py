"""Shards and plans of tests: small, written by the real writer."""

import hashlib
from pathlib import Path

import numpy as np

from data_pipeline.shard_writer import TokenizerRecord, write_shard
from ring_train.config import DataConfig, DomainConfig, compose
from ring_train.plan import Plan, make_plan

VOCAB_SIZE = 512
EOS = 511


def write_tokenizer(folder: Path) -> TokenizerRecord:
    """Write a stand-in for a tokenizer folder: only its bytes matter to the reader."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text('{"stands": "in"}')
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    return TokenizerRecord(sha256=digest, vocab_size=VOCAB_SIZE, eos_token_id=EOS)


def write_random_shard(prefix: Path, num_documents: int, seed: int) -> list[np.ndarray]:
    """Write and return documents of 2 to 40 tokens, with a tokenizer folder beside them."""
    rng = np.random.default_rng(seed)
    documents = [
        np.append(rng.integers(0, EOS, rng.integers(1, 40)), EOS) for _ in range(num_documents)
    ]
    write_shard(prefix, documents, write_tokenizer(prefix.parent / "tokenizer"))
    return documents


def make_data_plan(folder: Path, *, world_size: int = 1, **changes: object) -> Plan:
    """Return the plan of a tiny model over domains `code` (1:3) and `math` (2:3) in `folder`."""
    for number, name in enumerate(("code", "math")):
        if not (folder / f"{name}.idx").exists():
            write_random_shard(folder / name, 60, seed=number)
            write_random_shard(folder / f"{name}_valid", 40, seed=number + 10)
    overrides: dict[str, object] = {
        **{"model": "tiny", "model.vocab_size": VOCAB_SIZE, "model.eos_token_id": EOS},
        **{"optim": "constant", "optim.lr_warmup_steps": 0},
        **{"train": "cpu", "train.seq_length": 32, "train.num_steps": 12, "train.eval_steps": 2},
        **{"train.global_batch_size": 8, "train.micro_batch_size": 2},
        **changes,
    }
    config = compose("pretrain", [f"{key}={value}" for key, value in overrides.items()])
    config.data = DataConfig(
        domains={
            name: DomainConfig(
                path=str(folder / name), valid_path=str(folder / f"{name}_valid"), weight=weight
            )
            for name, weight in (("math", 2.0), ("code", 1.0))
        },
        tokenizer=str(folder / "tokenizer"),
        index_dir=str(folder / "index"),
    )
    return make_plan(config, world_size)
