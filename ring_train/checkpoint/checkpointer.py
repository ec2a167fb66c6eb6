"""Saving and restoring weights, optimizer state and position of a run, under any layout.

A checkpoint is the folder `checkpoints/step_00000100`; see docs/checkpoints.md for what is in it.
The data position is the step, and so is the place in the schedule: the data stream and the schedule
are pure functions of it. Nothing draws random numbers during training but what seeds are derived
for, so torch's generator of rank 0 stands for all.
"""

from __future__ import annotations

import ring_train.platform  # noqa: F401  (before the first import of megatron-core)

# isort: split

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from ring_train.checkpoint.errors import CheckpointError, DamagedCheckpoint
from ring_train.checkpoint.folders import (
    drop_after,
    is_whole,
    newest_step,
    set_damaged_aside,
    step_path,
    whole_steps,
)
from ring_train.checkpoint.identity import (
    check_same_adapters,
    check_same_model,
    check_same_precision,
    has_adapters,
)
from ring_train.checkpoint.manifest import CONFIG_FILE, STATE_FILE, Manifest, read_manifest
from ring_train.checkpoint.ranks import from_rank_0, on_all_ranks, raise_first
from ring_train.checkpoint.reading import (
    Copy,
    check_hashes,
    check_pieces,
    plan_copies,
    read_checked,
    run_copies,
)
from ring_train.checkpoint.state import TrainState, read_state, state_text
from ring_train.checkpoint.tensors import (
    Held,
    Moments,
    current_moments,
    held_loads,
    held_state,
    held_weights,
    new_moments,
    optimizer_step,
    set_state,
)
from ring_train.checkpoint.writing import Save, SaveJob, prepare_folder, save_problem, snapshot
from ring_train.config import to_yaml
from ring_train.model.lora import is_adapter
from ring_train.model.tensors import Shard
from ring_train.plan import Plan
from ring_train.runtime.device import local_device

logger = logging.getLogger(__name__)

RNG_KEY = "rng/torch"
"""Kind and name of the state of torch's generator."""
Model = list[DistributedDataParallel]


@dataclass(frozen=True)
class _Resumed:
    """A checkpoint that was found right and is about to be copied."""

    state: TrainState
    manifest: Manifest
    copies: list[Copy]
    moments: Moments
    optimizer_step: int
    rng: torch.Tensor


class Checkpointer:
    """Checkpoints of one run folder.

    Args:
        plan: the plan; its model is checked against a checkpoint before anything is loaded.
        groups: process groups of the mesh.
    """

    def __init__(self, plan: Plan, groups: ProcessGroupCollection) -> None:
        self.plan = plan
        self.groups = groups
        self.folder = Path(plan.config.run_dir) / "checkpoints"
        self.on_saved: Callable[[int, float], None] = lambda step, seconds: None
        """Called on rank 0, in the thread that writes, with a step and how long its save took."""
        self._running: Save | None = None
        self._verified: int | None = None

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        return whole_steps(self.folder)

    def is_new_run(self) -> bool:
        """Return whether the run has no checkpoint, as rank 0 sees it. Collective over all ranks.

        Raises:
            CheckpointError: the newest checkpoint is damaged.
        """
        return from_rank_0(lambda: newest_step(self.folder)) is None

    def settle(self) -> list[Path]:
        """Set damaged checkpoints aside until the newest one is sound; return where they are.

        Every byte of what is kept is read. Collective over all ranks.

        Raises:
            CheckpointError: the newest checkpoint is of another version, or cannot be renamed.
        """
        aside: list[Path] = []
        while True:
            try:
                step = from_rank_0(lambda: newest_step(self.folder))
                if step is not None:
                    self._verify(step)
            except DamagedCheckpoint as error:
                aside.append(from_rank_0(lambda: set_damaged_aside(self.folder)))
                logger.warning("%s; it is set aside as %s", error, aside[-1])
            else:
                self._verified = step
                return aside

    def _verify(self, step: int) -> None:
        folder = self.path(step)
        _check_hashes(folder, on_all_ranks(lambda: read_manifest(folder)))

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` steps."""
        return step_path(self.folder, step)

    def save(self, state: TrainState, model: Model, optimizer: MegatronOptimizer) -> Path:
        """Begin a checkpoint and return its folder, which appears when it is complete.

        The state is copied before this returns; `finish` waits for the disk. An earlier save is
        waited for first. Collective over all ranks.

        Raises:
            CheckpointError: the earlier save failed, the disk has no room for this one, or the
                state could not be copied.
        """
        self.finish()
        target = self.path(state.step)
        held = self._held(model, optimizer)
        sizes = [x.values.nbytes for x in held if x.is_written]
        needed = torch.tensor(sum(sizes), device=local_device())
        torch.distributed.all_reduce(needed)
        num_bytes = int(needed)

        def begin() -> str | None:
            return None if is_whole(target) else prepare_folder(self.folder, state.step, num_bytes)

        nonce = from_rank_0(begin)
        if nonce is None:
            return target
        num_updates = _on_any_rank(optimizer_step(optimizer))
        # No name here for the copies: only the save may keep them alive.
        began, on_saved = time.monotonic(), self.on_saved
        self._running = Save(
            on_all_ranks(lambda: self._job(state, held, num_updates, nonce)),
            lambda: on_saved(state.step, time.monotonic() - began),
        )
        if not self.plan.config.checkpoint.async_save:
            self.finish()
        return target

    def finish(self) -> None:
        """Wait until the save that was begun is complete. Collective over all ranks.

        Raises:
            CheckpointError: it failed on a rank; nothing of it is left.
        """
        save, self._running = self._running, None
        if save is None:
            return
        try:
            raise_first(_problem(save, save.written.exception()))
            raise_first(_problem(save, save.committed.exception()))
        except CheckpointError:
            save.abandon()
            torch.distributed.barrier()
            raise

    def has_failed(self) -> bool:
        """Return whether this rank knows that the save under way has failed."""
        save = self._running
        futures = [] if save is None else [save.written, save.committed]
        return any(future.done() and future.exception() for future in futures)

    def newest_within(self, steps: int) -> int:
        """Return the step of the newest checkpoint of at most so many steps. Collective.

        Raises:
            CheckpointError: there is none.
        """
        found = from_rank_0(lambda: max((s for s in self.steps() if s <= steps), default=None))
        if found is None:
            raise CheckpointError(
                f"{self.folder} holds no checkpoint of at most {steps} steps to roll back to; "
                "journal.jsonl tells which steps were bad and why: mend it and start the run "
                "again, or raise resilience.max_skipped_in_a_row"
            )
        return found

    def roll_back(self, step: int, model: Model, optimizer: MegatronOptimizer) -> TrainState:
        """Load the checkpoint of a step; newer ones are no more. Collective over all ranks.

        Raises:
            CheckpointError: see `restore_or_init`.
        """
        from_rank_0(lambda: drop_after(self.folder, step))
        return self.restore_or_init(model, optimizer)

    def restore_or_init(self, model: Model, optimizer: MegatronOptimizer) -> TrainState:
        """Load the newest checkpoint of the run into model and optimizer, if there is one.

        Collective over all ranks.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another model or precision, and model
                and optimizer are as they were; or a file that was found right cannot be read again.
        """
        step = from_rank_0(lambda: newest_step(self.folder))
        if step is None:
            return TrainState()
        folder = self.path(step)
        resumed = on_all_ranks(lambda: self._plan_restore(folder, model, optimizer))
        if step != self._verified:
            _check_hashes(folder, resumed.manifest)
        _check_pieces(folder, resumed.manifest, resumed.copies)

        def fill() -> None:
            run_copies(folder, resumed.copies)
            set_state(optimizer, resumed.moments, resumed.optimizer_step)
            torch.set_rng_state(resumed.rng)

        on_all_ranks(fill)
        logger.info("resumed from %s", folder)
        return resumed.state

    def _held(self, model: Model, optimizer: MegatronOptimizer) -> list[Held]:
        """Return what this rank holds of what a checkpoint holds."""
        return [
            *held_weights(model, self.groups),
            *held_loads(model, self.groups),
            *held_state(model, optimizer, self.groups, current_moments(optimizer)),
            _held_rng(torch.get_rng_state()),
        ]

    def _job(self, state: TrainState, held: list[Held], num_updates: int, nonce: str) -> SaveJob:
        """Return what this rank writes, copied from what it holds."""
        config, rank = self.plan.config, torch.distributed.get_rank()
        tensors, values = snapshot([item for item in held if item.is_written], rank)
        return SaveJob(
            folder=self.folder,
            step=state.step,
            rank=rank,
            world_size=torch.distributed.get_world_size(),
            nonce=nonce,
            tensors=tensors,
            values=values,
            small_files={CONFIG_FILE: to_yaml(config), STATE_FILE: state_text(state, num_updates)},
            saved_by={"world_size": self.plan.mesh.world_size, "parallel": asdict(config.parallel)},
            keep=config.checkpoint.keep,
        )

    def _plan_restore(self, folder: Path, model: Model, optimizer: MegatronOptimizer) -> _Resumed:
        """Return what to copy from a checkpoint of this run; changes nothing."""
        manifest = read_manifest(folder)
        read_checked(folder, manifest, CONFIG_FILE)
        check_same_model(folder / CONFIG_FILE, self.plan.config.model)
        check_same_adapters(folder / CONFIG_FILE, self.plan.config.lora)
        check_same_precision(folder / CONFIG_FILE, self.plan.config.train)
        if RNG_KEY not in manifest.tensors:
            raise CheckpointError(
                f"{folder} holds weights alone, as merged checkpoints do, and no run can go on "
                f"from it; start one in a new run_dir with init_from={folder}"
            )
        state, num_updates = read_state(folder, manifest)
        moments = new_moments(optimizer) if num_updates else {}
        rng = torch.get_rng_state()
        loads = held_loads(model, self.groups)  # none, if the balance loss is new
        wanted = [
            *held_weights(model, self.groups),
            *(load for load in loads if load.key in manifest.tensors),
            *held_state(model, optimizer, self.groups, moments),
            _held_rng(rng),
        ]
        copies = plan_copies(folder, manifest, wanted, same_dtype=True)
        return _Resumed(state, manifest, copies, moments, num_updates, rng)


def _held_rng(state: torch.Tensor) -> Held:
    is_written = torch.distributed.get_rank() == 0
    return Held(RNG_KEY, state, 0, tuple(state.shape), Shard(dim=0, world=1, rank=0), is_written)


def _on_any_rank(num_updates: int) -> int:
    """Return the updates made; a rank whose stage trains nothing has made none. Collective."""
    most = torch.tensor(num_updates, device=local_device())
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)


def _problem(save: Save, error: BaseException | None) -> str | None:
    return None if error is None else save_problem(save.job.target, error)


def load_weights(folder: Path, model: Model, plan: Plan, groups: ProcessGroupCollection) -> None:
    """Load the weights and expert biases of a checkpoint, saved under any layout.

    Weights of another precision are converted, MTP depths that the model lacks are left out, and
    adapters of the model stay as they are if the checkpoint has none. Collective over all ranks.

    Raises:
        CheckpointError: no complete checkpoint, a damaged one, one of another model or of other
            adapters, and the model is as it was; or a file that was found right cannot be read
            again.
    """

    def plan_load() -> tuple[Manifest, list[Copy]]:
        manifest = read_manifest(folder)
        read_checked(folder, manifest, CONFIG_FILE)
        check_same_model(folder / CONFIG_FILE, plan.config.model, weights_only=True)
        adapted = has_adapters(folder / CONFIG_FILE)
        if adapted:
            check_same_adapters(folder / CONFIG_FILE, plan.config.lora)
        weights = held_weights(model, groups)
        wanted = [item for item in weights if adapted or not is_adapter(item.key)]
        return manifest, plan_copies(folder, manifest, wanted, same_dtype=False)

    manifest, copies = on_all_ranks(plan_load)
    _check_hashes(folder, manifest)
    _check_pieces(folder, manifest, copies)
    on_all_ranks(lambda: run_copies(folder, copies))


def _check_hashes(folder: Path, manifest: Manifest) -> None:
    """Raise on all ranks unless the files are what was written. Collective; ranks share them."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    on_all_ranks(lambda: check_hashes(folder, manifest, rank, world_size))


def _check_pieces(folder: Path, manifest: Manifest, copies: list[Copy]) -> None:
    """Raise on all ranks unless the files hold what is to be copied. Collective over all ranks."""
    on_all_ranks(lambda: check_pieces(folder, manifest, (copy.piece for copy in copies)))
