"""The hybrid model, assembled from vLLM's layers of the Bailing MoE family.

Unusual: classes here take over the methods of vLLM's softmax model (forward, loader, head) but not
its constructors, which would build softmax attention in every layer.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateShapeCalculator,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.bailing_moe import (
    BailingAttention,
    BailingMLP,
    BailingMoE,
    BailingMoeBlock,
    BailingMoeForCausalLM,
    BailingMoeModel,
)
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)

from ring_linear_vllm.attention import RingLinearAttention
from ring_linear_vllm.config import is_lightning_layer

logger = init_logger(f"vllm.{__name__}")


class RingLinearBlock(BailingMoeBlock):
    """One layer: lightning or softmax attention, then a dense or a mixture-of-experts MLP."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Build the layer whose place the prefix names."""
        nn.Module.__init__(self)
        config, quant = vllm_config.model_config.hf_config, vllm_config.quant_config
        index = extract_layer_index(prefix)
        name = f"{prefix}.attention"
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = (
            RingLinearAttention(config, vllm_config, prefix=name)
            if is_lightning_layer(config, index)
            else BailingAttention(config, vllm_config.cache_config, quant, prefix=name)
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        mlp = BailingMLP if index < config.first_k_dense_replace else BailingMoE
        self.mlp = mlp(config.intermediate_size, config, quant, prefix=f"{prefix}.mlp")


@support_torch_compile
class RingLinearModel(BailingMoeModel):
    """Embedding, hybrid layers and final norm of this pipeline stage."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build the layers of this stage."""
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        stage = get_pp_group()
        self.config = config
        self.word_embeddings = (
            VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.word_embeddings",
            )
            if stage.is_first_rank
            else PPMissingLayer()
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: RingLinearBlock(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = (
            RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if stage.is_last_rank
            else PPMissingLayer()
        )
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )


class BailingMoeLinearV2ForCausalLM(BailingMoeForCausalLM, HasInnerState, IsHybrid):
    """Ring-linear 2.0 with its language-model head."""

    supports_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build the model of this rank."""
        nn.Module.__init__(self)
        config, quant = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.config = config
        self.quant_config = quant
        self.model = RingLinearModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = (
            ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=quant,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if get_pp_group().is_last_rank
            else PPMissingLayer()
        )
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    @classmethod
    def get_mamba_state_shape_from_config(
        cls, vllm_config: VllmConfig
    ) -> tuple[tuple[int, int, int]]:
        """Return the shape of one sequence's state in one layer on one rank: [n, d, d]."""
        config = vllm_config.model_config.hf_config
        return MambaStateShapeCalculator.linear_attention_state_shape(
            num_heads=config.num_attention_heads,
            tp_size=vllm_config.parallel_config.tensor_parallel_size,
            head_dim=config.head_dim,
        )

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype]:
        """Return fp32, whatever the model computes in."""
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple:
        """Return how vLLM copies a state."""
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load all tensors but those of the MTP layers behind the trunk; return what was loaded."""
        return super().load_weights(self._without_mtp(weights))

    def _without_mtp(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """Yield the tensors of the trunk; nothing is predicted ahead."""
        trunk, num_skipped = self.config.num_hidden_layers, 0
        for name, weight in weights:
            if name.startswith("model.layers.") and int(name.split(".")[2]) >= trunk:
                num_skipped += 1
                continue
            yield name, weight
        if num_skipped:
            logger.info("Left out %d tensors of multi-token prediction", num_skipped)
