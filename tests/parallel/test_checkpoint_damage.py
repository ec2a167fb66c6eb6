"""A checkpoint that is damaged or of another run is refused by all ranks; nothing was touched."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import PP2, short_plan

if TYPE_CHECKING:
    from ring_train.checkpoint.manifest import Manifest, StoredTensor

FIRST_SHARD, SHARD = "rank_00000.safetensors", "rank_00001.safetensors"
NAME = "weight/decoder.layers.0.self_attention.linear_qkv.weight"


def changed_byte(name: str, position: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(position * (len(content) - 1))] ^= 1
        (folder / name).write_bytes(content)

    return damage


def cut(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:-1])


def replaced(folder: Path) -> None:
    """Put another safetensors file in, and its size and hash into the manifest."""
    import torch

    from ring_train.checkpoint.manifest import manifest_text, read_manifest
    from ring_train.storage.safetensors import write_tensors

    manifest = read_manifest(folder)
    files = {**manifest.files, SHARD: write_tensors(folder / SHARD, {"a": torch.zeros(3)})}
    (folder / "manifest.json").write_text(manifest_text(replace(manifest, files=files)))


def rewritten(change: Callable[[StoredTensor], StoredTensor | None]) -> Callable[[Path], None]:
    """Return a damage that changes a tensor in a manifest whose hash is right again."""

    def damage(folder: Path) -> None:
        from ring_train.checkpoint.manifest import manifest_text, read_manifest

        manifest: Manifest = read_manifest(folder)
        tensors = dict(manifest.tensors)
        changed = change(tensors.pop(NAME))
        if changed is not None:
            tensors[NAME] = changed
        text = manifest_text(replace(manifest, tensors=tensors))
        (folder / "manifest.json").write_text(text)

    return damage


def other_version(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 7}))


@dataclass(frozen=True)
class Case:
    message: str
    damage: Callable[[Path], None] = lambda folder: None
    overrides: tuple[str, ...] = ()


CASES = {
    "missing shard": Case(f"{SHARD} is missing", lambda folder: (folder / SHARD).unlink()),
    "cut shard": Case(f"{SHARD} has .* bytes, but the manifest says", cut),
    "changed tensor": Case(f"{SHARD} does not have the hash", changed_byte(SHARD, 1)),
    "changed tensor of rank 0": Case(
        f"{FIRST_SHARD} does not have the hash", changed_byte(FIRST_SHARD, 1)
    ),
    "changed header": Case(f"{SHARD} does not have the hash", changed_byte(SHARD, 0.02)),
    "changed manifest": Case("manifest.json", changed_byte("manifest.json", 0.5)),
    "changed state": Case(
        "train_state.json does not have the hash", changed_byte("train_state.json", 0.5)
    ),
    "changed config": Case("config.yaml does not have the hash", changed_byte("config.yaml", 0.5)),
    "missing manifest": Case(
        "no manifest.json", lambda folder: (folder / "manifest.json").unlink()
    ),
    "other version": Case(
        "format_version=7, but this version of ring_train reads 1", other_version
    ),
    "other file": Case(f"{SHARD} does not hold what the manifest states", replaced),
    "missing tensor": Case(f"{NAME}: the tensor is missing", rewritten(lambda tensor: None)),
    "missing piece": Case(
        f"{NAME}: .* elements are there",
        rewritten(lambda tensor: replace(tensor, pieces=tensor.pieces[1:])),
    ),
    "overlap": Case(
        f"{NAME}: the parts .* overlap",
        rewritten(lambda tensor: replace(tensor, pieces=tensor.pieces + tensor.pieces[:1])),
    ),
    "other dtype": Case(
        f"{NAME}: its dtype is BF16", rewritten(lambda tensor: replace(tensor, dtype="BF16"))
    ),
    "other shape": Case(
        f"{NAME}: its shape is ",
        rewritten(lambda tensor: replace(tensor, shape=(2 * tensor.shape[0], tensor.shape[1]))),
    ),
    "other piece": Case(
        "does not hold what the manifest states",
        rewritten(
            lambda tensor: replace(
                tensor, pieces=tuple(replace(piece, name="x") for piece in tensor.pieces)
            )
        ),
    ),
    "other model": Case(
        r"checkpoint of another model: model\.vocab_size=1024 \(checkpoint: ",
        overrides=("model.vocab_size=1024",),
    ),
    "other precision": Case(
        r"train\.precision=bf16 \(checkpoint: fp32\); resume", overrides=("train.precision=bf16",)
    ),
}


def save(run_dir: Path, overrides: list[str]) -> None:
    """Train a step and save."""
    from ring_train.checkpoint import TrainState
    from ring_train.checkpoint.checkpointer import Checkpointer
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer
    from ring_train.train.step import train_step
    from tests.parallel.streams import make_micro_batches

    plan = short_plan([*overrides, f"run_dir={run_dir}"])
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        rows = make_micro_batches(plan, 0, groups.dp_rank)
        train_step(plan, model, optimizer, rows, groups.collection, step=0, num_domains=1)
        checkpoints = Checkpointer(plan, groups.collection)
        checkpoints.save(TrainState(step=1), model, optimizer)
        checkpoints.finish()


def load_all(run_dir: Path, overrides: list[str]) -> dict[str, tuple[str, bool]]:
    """Return {case: (message, whether the state is as before)}."""
    from ring_train.checkpoint import CheckpointError
    from ring_train.checkpoint.checkpointer import Checkpointer
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer

    found = {}
    plan = short_plan(overrides)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        before = digest(model, optimizer, groups.collection)
        for name, case in CASES.items():
            words = [*overrides, *case.overrides, f"run_dir={run_dir / name}"]
            checkpoints = Checkpointer(short_plan(words), groups.collection)
            try:
                checkpoints.restore_or_init(model, optimizer)
            except CheckpointError as error:
                unchanged = digest(model, optimizer, groups.collection) == before
                found[name] = str(error), unchanged
    return found


def digest(model: Any, optimizer: Any, groups: Any) -> str:
    """Return a digest of what restoring a checkpoint would change on this rank."""
    import torch

    from ring_train.checkpoint.tensors import current_moments, held_state, held_weights

    total = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    moments = current_moments(optimizer)
    for held in [
        *held_weights(model, groups),
        *held_state(model, optimizer, groups, moments),
    ]:
        total.update(held.key.encode() + held.values.numpy().tobytes())
    total.update(repr([group.get("step") for group in optimizer.param_groups]).encode())
    return total.hexdigest()


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, tuple[str, bool]]]:
    """Per rank, what each case said."""
    return []


@pytest.mark.parametrize("name", CASES)
def test_damage_is_refused_before_any_state_is_touched(
    name: str,
    outcomes: list[dict[str, tuple[str, bool]]],
    on_ranks: OnRanks,
    tmp_path: Path,
) -> None:
    if not outcomes:
        on_ranks(2, save, tmp_path / "whole", PP2)
        for other, case in CASES.items():
            shutil.copytree(tmp_path / "whole", tmp_path / other)
            case.damage(tmp_path / other / "checkpoints" / "step_00000001")
        outcomes += on_ranks(2, load_all, tmp_path, PP2)  # rank 0 needs no damaged file
    for outcome in outcomes:
        assert name in outcome, "it was loaded"
        message, unchanged = outcome[name]
        assert unchanged
        with pytest.raises(ValueError, match=CASES[name].message):
            raise ValueError(message)
