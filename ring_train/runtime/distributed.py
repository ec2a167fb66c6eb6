"""Process groups. The only file that touches megatron-core's global `parallel_state`."""

import ring_train.platform  # noqa: F401  (before the first import of megatron-core)

# isort: split

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from ring_train.errors import UserError
from ring_train.runtime.agreement import Agreement
from ring_train.runtime.device import local_device
from ring_train.runtime.logs import start_logs

if TYPE_CHECKING:
    from ring_train.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """The process groups of this rank and its place in them."""

    collection: ProcessGroupCollection
    """What megatron-core's `pg_collection` arguments take."""
    agreement: Agreement
    """What all ranks agree on, apart from what they compute."""
    device: torch.device
    """Where this rank's tensors live."""
    rank: int
    """Global, 0-based; `*_rank` are ranks within the axis."""
    world_size: int
    tp_rank: int
    pp_rank: int
    ep_rank: int
    etp_rank: int
    cp_rank: int
    dp_rank: int
    """Data-parallel rank without the context-parallel axis: which micro batches this rank reads."""

    @property
    def is_first_stage(self) -> bool:
        """This rank holds the first pipeline stage."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """This rank holds the last pipeline stage, where the loss is."""
        return self.pp_rank == self.collection.pp.size() - 1


@contextlib.contextmanager
def start_runtime(plan: "Plan") -> Iterator[Groups]:
    """Start process groups, seeds and log lines for a plan; stop them at the end.

    Collective over the whole world: torchrun's, or this process alone without torchrun. NCCL where
    there is CUDA, else gloo. A process group that is already initialised is used and left running.

    Raises:
        UserError: the world has another size than the plan.
    """
    owned = not dist.is_initialized()
    if owned:
        _init_world(plan.mesh.world_size)
    groups = None
    try:
        groups = _make_groups(plan)
        yield groups
    except UserError as error:
        if owned and not _is_first_to_fail():
            raise SystemExit(2) from error
        error.rank = dist.get_rank()
        raise
    finally:
        _forget_groups()
        if groups is not None and not owned:
            dist.destroy_process_group(groups.agreement.group)
        if owned:
            dist.destroy_process_group()


def _init_world(expected_size: int) -> None:
    """Initialise torch.distributed from torchrun's environment, or alone without it."""
    device = local_device()
    nccl = device.type == "cuda"
    if nccl:
        torch.cuda.set_device(device)
    backend = "nccl" if nccl else "gloo"
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != expected_size:
        raise UserError(
            f"this job has {world_size} processes but its plan was made for {expected_size}; "
            f"start it with torchrun --nproc-per-node {expected_size}"
        )
    if "RANK" in os.environ:
        dist.init_process_group(backend, device_id=device if nccl else None)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _make_groups(plan: "Plan") -> Groups:
    mesh = plan.mesh
    if dist.get_world_size() != mesh.world_size:
        raise UserError(
            f"the process group has {dist.get_world_size()} ranks but the plan was made for "
            f"{mesh.world_size}"
        )
    start_logs(dist.get_rank())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=mesh.tp,
        pipeline_model_parallel_size=mesh.pp,
        virtual_pipeline_model_parallel_size=mesh.vpp if mesh.vpp > 1 else None,
        context_parallel_size=mesh.cp,
        expert_model_parallel_size=mesh.ep,
        expert_tensor_parallel_size=mesh.etp,
        # The optimizer takes the groups of a collection, which has no separate gloo groups.
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(plan.config.seed, force_reset_rng=True)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    agreement = Agreement(_control_group(), stages=mesh.pp, stage=collection.pp.rank())
    # Making a gloo group ends on a rank when it is connected itself: if it then leaves at once, one
    # that is slower finds the connection closed. Nobody passes here before all groups are there.
    agreement.any(False)
    return Groups(
        collection=collection,
        agreement=agreement,
        device=local_device(),
        rank=dist.get_rank(),
        world_size=mesh.world_size,
        tp_rank=collection.tp.rank(),
        pp_rank=collection.pp.rank(),
        ep_rank=collection.ep.rank(),
        etp_rank=collection.expt_tp.rank(),
        cp_rank=collection.cp.rank(),
        dp_rank=collection.dp.rank(),
    )


def _control_group() -> dist.ProcessGroup:
    """Return a gloo group of all ranks that nothing else uses. Collective over the world."""
    group = dist.new_group(backend="gloo", group_desc="control")
    assert isinstance(group, dist.ProcessGroup), "every rank is a member"
    return group


def _forget_groups() -> None:
    """Drop every process group that megatron's globals hold.

    megatron's own destroy_model_parallel leaves some. A gloo group that outlives its world waits
    for its threads when it is freed at last, which in a fork of this process is for ever.
    """
    parallel_state.destroy_model_parallel()
    for name, value in vars(parallel_state).items():
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)


def _is_first_to_fail() -> bool:
    """Return whether no other rank has failed before, so that a job reports an error once."""
    try:
        return dist.distributed_c10d._get_default_store().add("ring_train/failed", 1) == 1
    except RuntimeError:
        return True
