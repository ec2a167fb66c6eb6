"""Which code computes a layer; no choice here changes a model or what a checkpoint holds."""

from dataclasses import dataclass

from ring_train.config.choices import (
    CrossEntropyKernel,
    ExpertKernel,
    FlexDispatcher,
    Fp8,
    Kernel,
    LightningKernel,
    TokenDispatcher,
    TransformerImpl,
)


@dataclass(kw_only=True)
class KernelsConfig:
    """Kernels of a run; `auto` takes the fastest that the device has."""

    lightning: LightningKernel = LightningKernel.auto
    """Of lightning attention."""
    fused: Kernel = Kernel.auto
    """Of QK-norm with partial RoPE, norms, the router, what surrounds the products of grouped
    experts, and chunks of logits."""
    cross_entropy: CrossEntropyKernel = CrossEntropyKernel.chunked
    """Of lm_head and loss, MTP depths alike."""
    cross_entropy_chunk_tokens: int = 1024
    """Tokens whose logits exist at a time, for `chunked`."""
    experts: ExpertKernel = ExpertKernel.auto
    """Of the routed experts without Transformer Engine."""
    transformer_impl: TransformerImpl = TransformerImpl.local
    """Projections, norms, softmax attention and experts."""
    fp8: Fp8 = Fp8.none
    """Of projections and experts; router, norms, gates, lm_head and MTP projections stay bf16."""
    moe_token_dispatcher_type: TokenDispatcher = TokenDispatcher.alltoall
    """How tokens travel to the ranks of their experts."""
    moe_flex_dispatcher_backend: FlexDispatcher = FlexDispatcher.deepep
    """Library behind the dispatcher `flex`."""
    moe_shared_expert_overlap: bool = False
    """Compute the shared expert while tokens travel; for the dispatcher `alltoall`."""
