"""Averages of checkpoints: what they equal, what survives an interruption, what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ring_train.checkpoint import CheckpointError, find_checkpoint, merging
from ring_train.checkpoint.decay_curves import update_weights
from ring_train.checkpoint.folders import step_path
from ring_train.checkpoint.manifest import read_manifest
from ring_train.checkpoint.merging import (
    check_output,
    choose_checkpoints,
    open_merge,
    write_merge,
)
from ring_train.checkpoint.reading import tensor_digests
from ring_train.checkpoint.state import read_state
from ring_train.checkpoint.weights import open_weights
from ring_train.config import DecayCurve, compose
from ring_train.jobs import merge_checkpoints
from tests.unit.checkpoint.small_checkpoints import SHAPES, TINY, random_tensors, save
from tests.unit.hf.test_memory import ALLOCATOR_BYTES, resident_bytes, start_high_water

TRAJECTORY_TOLERANCE = 1e-10
"""fp64 on both sides; what the issue asks for."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Three checkpoints, of one and of two ranks, with a moment beside the weights."""
    for number, step in enumerate((10, 20, 30)):
        tensors = random_tensors(number)
        moment = {"exp_avg/norm.weight": torch.ones(7)}
        save(tmp_path / "run", step, {**tensors, **moment}, ranks=1 + number % 2)
    return tmp_path / "run"


def merge(run_dir: Path, output: Path, curve: DecayCurve = DecayCurve.linear) -> Path:
    folders = choose_checkpoints(run_dir, 3, None)
    write_merge(open_merge(folders, curve), output)
    return output


@dataclass(frozen=True)
class Trajectory:
    """Stochastic gradient descent on a quadratic at a constant rate."""

    rate: float
    points: list[dict[str, torch.Tensor]]
    """At each checkpoint."""
    gradients: list[list[dict[str, torch.Tensor]]]
    """Of each step between a checkpoint and the next."""


def descend(num_checkpoints: int, steps_between: int) -> Trajectory:
    generator = torch.Generator().manual_seed(7)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    curvature = {name: draw(shape).exp() for name, shape in SHAPES.items()}
    minimum = {name: draw(shape) for name, shape in SHAPES.items()}
    point = {name: draw(shape) for name, shape in SHAPES.items()}
    rate, points, gradients = 0.05, [dict(point)], []
    for _ in range(num_checkpoints - 1):
        gradients.append([])
        for _ in range(steps_between):
            gradient = {
                name: curvature[name] * (point[name] - minimum[name]) + draw(shape)
                for name, shape in SHAPES.items()
            }
            point = {name: point[name] - rate * gradient[name] for name in SHAPES}
            gradients[-1].append(gradient)
        points.append(dict(point))
    return Trajectory(rate, points, gradients)


@pytest.mark.parametrize("curve", DecayCurve)
def test_the_average_is_where_the_decayed_rate_leads(curve: DecayCurve, tmp_path: Path) -> None:
    """The same gradients, each step at the rate times the curve."""
    trajectory = descend(num_checkpoints=8, steps_between=5)
    steps = [5 * number for number in range(8)]
    for step, point in zip(steps, trajectory.points, strict=True):
        save(tmp_path, step, {f"weight/{name}": tensor for name, tensor in point.items()})
    decayed = dict(trajectory.points[0])
    factors = update_weights(curve, steps)[1:]
    for factor, stretch in zip(factors, trajectory.gradients, strict=True):
        for gradient in stretch:
            for name in SHAPES:
                decayed[name] = decayed[name] - trajectory.rate * factor * gradient[name]
    folders = choose_checkpoints(tmp_path, None, steps)
    write_merge(open_merge(folders, curve), tmp_path / "merged")
    merged = open_weights(tmp_path / "merged")
    for name in SHAPES:
        error = (merged.read(name) - decayed[name]).abs().max()
        assert float(error) < TRAJECTORY_TOLERANCE
    moved = (trajectory.points[-1]["norm.weight"] - decayed["norm.weight"]).abs().max()
    assert (float(moved) > TRAJECTORY_TOLERANCE) == (curve is not DecayCurve.constant)


def test_masters_are_averaged_in_place_of_rounded_weights(tmp_path: Path) -> None:
    masters = [random_tensors(number) for number in range(4)]  # quarters are exact
    for number, master in enumerate(masters):
        rounded = {key: tensor.bfloat16() for key, tensor in master.items() if "bias" not in key}
        kept = {key.replace("weight/", "master/", 1): master[key] for key in rounded}
        save(tmp_path, number + 1, {**master, **rounded, **kept})
    folders = choose_checkpoints(tmp_path, 4, None)
    write_merge(open_merge(folders, DecayCurve.linear), tmp_path / "merged")
    merged = open_weights(tmp_path / "merged")
    assert merged.names == sorted(SHAPES)
    for name in SHAPES:
        exact = torch.stack([master[f"weight/{name}"].double() for master in masters]).mean(0)
        assert torch.equal(merged.read(name), exact.float())


def test_constant_is_the_last_checkpoint_bit_for_bit(run_dir: Path) -> None:
    merged = open_weights(merge(run_dir, run_dir / "merged", DecayCurve.constant))
    last = random_tensors(2)
    assert all(torch.equal(merged.read(name), last[f"weight/{name}"]) for name in SHAPES)


def test_a_merged_checkpoint_is_one_like_any_other(run_dir: Path) -> None:
    output = merge(run_dir, run_dir / "deep" / "merged")
    assert find_checkpoint(output, "checkpoint") == output
    manifest = read_manifest(output)
    assert tensor_digests(output, manifest).keys() == {f"weight/{name}" for name in SHAPES}
    assert manifest.saved_by["merged"]["steps"] == [10, 20, 30]
    last = step_path(run_dir / "checkpoints", 30)
    assert (output / "config.yaml").read_text() == (last / "config.yaml").read_text()
    state, num_updates = read_state(output, manifest)
    assert (state.step, state.consumed_samples, num_updates) == (30, 120, 0)
    assert [path.name for path in output.parent.iterdir()] == ["merged"]


class Killed(BaseException):
    """What ends a process without its leave."""


def test_an_interrupted_merge_goes_on(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each part, and before the rename: no part is written again."""
    monkeypatch.setattr(merging, "PART_BYTES", 1)
    expected = merge(run_dir, run_dir / "expected")
    digests = tensor_digests(expected, read_manifest(expected))
    written: list[int] = []
    true_record, true_assemble = merging.write_record, merging.assemble

    def record_then_die(folder: Path, number: int, *rest: object) -> None:
        written.append(number)
        true_record(folder, number, *rest)  # pyrefly: ignore[bad-argument-type]
        raise Killed

    def assemble_then_die(*parts: object, **more: object) -> None:
        true_assemble(*parts, **more)  # pyrefly: ignore[bad-argument-type]
        raise Killed

    monkeypatch.setattr(merging, "write_record", record_then_die)
    monkeypatch.setattr(merging, "assemble", assemble_then_die)
    output = run_dir / "merged"
    for _ in range(len(SHAPES) + 1):
        with pytest.raises(Killed):
            merge(run_dir, output)
        assert not output.exists()
    merge(run_dir, output)
    assert written == [0, 1, 2]
    assert tensor_digests(output, read_manifest(output)) == digests


def test_parts_of_another_merge_are_not_mixed_in(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "PART_BYTES", 1)
    expected = merge(run_dir, run_dir / "expected", DecayCurve.cosine)
    true_record = merging.write_record

    def record_then_die(folder: Path, number: int, *rest: object) -> None:
        true_record(folder, number, *rest)  # pyrefly: ignore[bad-argument-type]
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(merging, "write_record", record_then_die)
        with pytest.raises(Killed):
            merge(run_dir, run_dir / "merged")
    output = merge(run_dir, run_dir / "merged", DecayCurve.cosine)
    one, other = (tensor_digests(x, read_manifest(x)) for x in (output, expected))
    assert one == other
    assert not list(run_dir.glob("*.partial"))


def test_a_full_disk_is_reported_and_the_merge_goes_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = run_dir / "merged"
    with monkeypatch.context() as patch:
        patch.setattr(merging, "write_durably", full_disk)
        with pytest.raises(CheckpointError, match=r"merged could not be written \(.*No space left"):
            merge(run_dir, output)
    assert not output.exists()
    assert merge(run_dir, output).is_dir()
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(run_dir)._replace(free=3)
        patch.setattr(merging.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(CheckpointError, match=r"partial needs 164 bytes, but 3 are free"):
            merge(run_dir, run_dir / "other")
    assert not list(run_dir.glob("other*"))


def full_disk(path: Path, chunks: object) -> None:
    raise OSError(28, "No space left on device", str(path))


def damage_byte(run_dir: Path) -> None:
    path = step_path(run_dir / "checkpoints", 20) / "rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def lose_file(run_dir: Path) -> None:
    (step_path(run_dir / "checkpoints", 20) / "rank_00000.safetensors").unlink()


def lose_manifest(run_dir: Path) -> None:
    (step_path(run_dir / "checkpoints", 20) / "manifest.json").unlink()


def lose_checkpoint(run_dir: Path) -> None:
    shutil.rmtree(step_path(run_dir / "checkpoints", 20))


def other_model(run_dir: Path) -> None:
    lose_checkpoint(run_dir)
    save(run_dir, 20, random_tensors(1), [*TINY, "model.first_k_dense_replace=2"])


def other_tensors(run_dir: Path) -> None:
    lose_checkpoint(run_dir)
    save(run_dir, 20, {**random_tensors(1), "weight/norm.weight": torch.ones(8)})


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (damage_byte, r"step_00000020/rank_00001\.safetensors does not have the hash"),
        (lose_file, r"step_00000020/rank_00000\.safetensors is missing"),
        (lose_manifest, r"step_00000020: no manifest\.json"),
        (lose_checkpoint, r"has fewer checkpoints: last=3 .* there are \[10, 30\]"),
        (other_model, r"step_00000020: checkpoint of another model: model\.first_k_dense_replace"),
        (other_tensors, r"step_00000020 and .*step_00000030 hold different .* first norm\.weight"),
    ],
)
def test_what_cannot_be_averaged_is_named(
    damage: Callable[[Path], None], match: str, run_dir: Path
) -> None:
    damage(run_dir)
    with pytest.raises(CheckpointError, match=match):
        merge(run_dir, run_dir / "merged")
    assert not list(run_dir.glob("merged*"))


@pytest.mark.parametrize(
    ("last", "steps", "match"),
    [
        (None, None, "last=None and steps=None: exactly one"),
        (2, [10, 20], "exactly one says"),
        (1, None, "needs two or more"),
        (0, None, "needs two or more"),
        (-2, None, "needs two or more"),
        (None, [10], "needs two or more"),
        (None, [10, 10], "two or more different"),
        (4, None, r"has fewer checkpoints: last=4 .* there are \[10, 20, 30\]"),
        (None, [10, 25], r"no checkpoint of steps \[25\]: .* choose from those"),
    ],
)
def test_which_checkpoints_is_said_exactly(
    last: int | None, steps: list[int] | None, match: str, run_dir: Path
) -> None:
    with pytest.raises(CheckpointError, match=match):
        choose_checkpoints(run_dir, last, steps)


def test_checkpoints_are_in_the_order_of_training(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    assert choose_checkpoints(run_dir, 2, None) == [step_path(folder, 20), step_path(folder, 30)]
    chosen = choose_checkpoints(run_dir, None, [30, 10])
    assert chosen == [step_path(folder, 10), step_path(folder, 30)]


def test_an_output_that_is_in_the_way_stays(run_dir: Path) -> None:
    folders = choose_checkpoints(run_dir, 3, None)
    (run_dir / "file").touch()
    for output in (run_dir / "file", run_dir, folders[0]):
        with pytest.raises(CheckpointError, match=r"exists; choose a new path"):
            check_output(output, folders)
    for name in ("step_00000031", "of_mine", "step_00000010/in", "of/mine", "../checkpoints/x"):
        output = run_dir / "checkpoints" / name
        with pytest.raises(CheckpointError, match=r"lies in .*/checkpoints\S*, among or inside"):
            check_output(output, folders)
    (run_dir / "empty").mkdir()
    assert read_manifest(merge(run_dir, run_dir / "empty")).step == 30


def test_an_output_does_not_reach_checkpoints_by_links(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "checkpoints").rename(tmp_path / "elsewhere")
    (run_dir / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "step_00000010")
    folders = choose_checkpoints(run_dir, 3, None)
    for output in (tmp_path / "elsewhere" / "of_mine", tmp_path / "link" / "in"):
        with pytest.raises(CheckpointError, match="among or inside checkpoints"):
            check_output(output, folders)


def test_a_rate_that_was_not_constant_is_noted() -> None:
    words = [*TINY, "optim=short", "train.num_steps=100"]
    config = compose("pretrain", words)
    assert merge_checkpoints.rate_note(config, [20, 40, 80]) == ""
    note = merge_checkpoints.rate_note(config, [60, 100])
    assert "from 0.003 to 0.0003" in note
    assert "from 0.00" in merge_checkpoints.rate_note(config, [5, 40])


def test_phases_with_another_position_embedding_are_not_mixed(tmp_path: Path) -> None:
    phases = [
        *("model=tiny", "train=cpu", "optim=constant", "optim.lr_warmup_steps=1"),
        *("data.domains.a={path:a}", "train.num_steps=9"),
        "phases.short={num_steps:5,weights:{a:1}}",
        "phases.long={num_steps:4,weights:{a:1},rotary_base:50000.0}",
    ]
    for step in (4, 5, 6):
        save(tmp_path, step, random_tensors(step), phases)
    folders = choose_checkpoints(tmp_path, None, [4, 5])
    merge_checkpoints.check_same_positions(folders)
    with pytest.raises(Exception, match=r"model\.rotary_base=10000\.0, .* with 50000\.0"):
        merge_checkpoints.check_same_positions(choose_checkpoints(tmp_path, None, [5, 6]))


def test_memory_of_a_merge_is_that_of_a_tensor(tmp_path: Path) -> None:
    """24 bytes for each element: see docs/merging.md."""
    num_tensors, num_elements = 100, 300_000
    for step in (10, 20, 30):
        tensors = {
            f"weight/{i}.weight": torch.full((num_elements,), 0.5) for i in range(num_tensors)
        }
        save(tmp_path, step, tensors)
    del tensors
    before = start_high_water()
    merge(tmp_path, tmp_path / "merged")
    grown = resident_bytes("VmHWM") - before
    bound = 24 * num_elements + ALLOCATOR_BYTES
    assert 4 * num_tensors * num_elements > 3 * bound
    assert grown < bound, grown
