"""How the model is spread over ranks. Every name is megatron-core's."""

from dataclasses import dataclass, field

from ring_train.config.choices import RecomputeGranularity, RecomputeMethod


@dataclass(kw_only=True)
class ParallelConfig:
    """Degrees of parallelism; data parallelism is what remains of the world size."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline rank; null = 1, without interleaving."""
    pipeline_layers: list[int] | None = None
    """Layers of each pipeline stage, or of each chunk in order of depth; null = split by cost."""
    expert_model_parallel_size: int = 1
    """Ranks that share one set of routed experts."""
    expert_tensor_parallel_size: int = 1
    context_parallel_size: int = 1
    sequence_parallel: bool | None = None
    """Shard activations between tensor-parallel regions; null = wherever tensor parallelism is."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients bucket by bucket during the last backward pass instead of after it."""
    overlap_param_gather: bool = False
    """Gather updated parameters during the next forward pass instead of before it."""

    recompute_granularity: RecomputeGranularity | None = None
    """Compute activations again in the backward pass; null = keep them all."""
    recompute_method: RecomputeMethod | None = None
    """Which layers, for full recomputation."""
    recompute_num_layers: int | None = None
    """Layers of a group (uniform) or of each stage (block), for full recomputation."""
    recompute_modules: list[str] = field(default_factory=list)
    """Parts of a layer, for selective recomputation: core_attn, mlp, moe, shared_experts."""

    allow_uncertified: bool = False
    """Run kinds of layout that were never compared with one rank, see docs/layouts.md."""
