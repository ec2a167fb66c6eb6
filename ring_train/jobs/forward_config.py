"""The config of a job that trains nothing: a model under a layout, and rows to run through it."""

import dataclasses
import os

from ring_train.config import Config, ModelConfig, ParallelConfig, Precision, compose
from ring_train.plan.context import row_unit

NO_TRAINING = {
    "use_distributed_optimizer": False,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
}
"""Parallel keys that are left aside: nothing is updated."""


def forward_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    precision: Precision,
    row_tokens: int = 1,
    num_rows: int = 1,
) -> Config:
    """Return a config that plans for the world of this job.

    Args:
        model: as trained.
        parallel: keys of the optimizer are left aside.
        precision: of weights and activations.
        row_tokens: the longest row; rounded up to what the layout can cut.
        num_rows: over all data-parallel ranks; rounded up to what they share.
    """
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    unit = row_unit(max(cp, 1), max(tp, 1))
    length = -(-row_tokens // unit) * unit
    base: Config = compose("pretrain", ["model=tiny", "train=cpu", "optim=short"])
    base.model = dataclasses.replace(
        model, max_position_embeddings=max(length, model.max_position_embeddings)
    )
    base.parallel = dataclasses.replace(parallel, **NO_TRAINING)
    base.train.precision = precision
    base.train.eval_interval_steps = 0
    base.train.seq_length, base.train.micro_batch_size = length, 1
    stages = parallel.pipeline_model_parallel_size
    dp = max(world_size() // max(tp * stages * cp, 1), 1)
    interleaved = (parallel.virtual_pipeline_model_parallel_size or 1) > 1
    share = dp * (stages if interleaved else 1)
    base.train.global_batch_size = share * -(-num_rows // max(share, 1))
    return base


def world_size() -> int:
    """Return the ranks of this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))
