"""Checkpoints of a few tensors under the config of a real run, by the writer of the package."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from ring_train.checkpoint import TrainState
from ring_train.checkpoint.state import state_text
from ring_train.checkpoint.tensors import Held
from ring_train.checkpoint.writing import SaveJob, commit, prepare_folder, snapshot, write_rank
from ring_train.config import compose, to_yaml
from ring_train.model.tensors import Shard

TINY = ["model=tiny", "data.domains={}"]
SHAPES = {"matrix.weight": (6, 5), "norm.weight": (7,), "router.expert_bias": (4,)}

Tensors = Mapping[str, torch.Tensor]


@functools.cache
def config_text(*words: str) -> str:
    return to_yaml(compose("pretrain", list(words)))


def save(
    run_dir: Path, step: int, tensors: Tensors, words: list[str] = TINY, ranks: int = 1
) -> None:
    """Save tensors by kind and name, their rows divided among ranks."""
    folder = run_dir / "checkpoints"
    nonce = prepare_folder(folder, step, 0)
    small_files = {
        "config.yaml": config_text(*words),
        "train_state.json": state_text(TrainState(step=step, consumed_samples=4 * step), step),
    }
    for rank in range(ranks):
        held = []
        for key, full in tensors.items():
            shard = Shard(dim=0, world=ranks if len(full) % ranks == 0 else 1, rank=rank)
            if shard.world == 1 and rank:
                continue
            local = shard.of(full) if shard.world > 1 else full
            held.append(Held(key, local.reshape(-1), 0, tuple(local.shape), shard, is_written=True))
        pieces, values = snapshot(held, rank)
        job = SaveJob(
            folder=folder,
            step=step,
            rank=rank,
            world_size=ranks,
            nonce=nonce,
            tensors=pieces,
            values=values,
            small_files=small_files,
            saved_by={"world_size": ranks},
            keep=None,
        )
        write_rank(job)
    commit(job, threading.Event())


def random_tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"weight/{name}": torch.randn(shape, generator=generator, dtype=dtype)
        for name, shape in SHAPES.items()
    }
