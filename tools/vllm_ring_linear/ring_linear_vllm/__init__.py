"""vLLM plugin that serves BailingMoeLinearV2ForCausalLM (Ring-linear 2.0).

vLLM finds it by its entry point and calls `register` in every process that it starts. The model is
assembled from vLLM's own layers; this package adds the decay rule, the fp32 state, and the
recurrence in plain torch where there is no GPU.
"""

ARCHITECTURE = "BailingMoeLinearV2ForCausalLM"


def register() -> None:
    """Make vLLM know the model, its config and the rules for serving it; may be called again."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ring_linear_vllm.config import BailingMoeLinearV2Config
    from ring_linear_vllm.rules import RingLinearRules

    AutoConfig.register(BailingMoeLinearV2Config.model_type, BailingMoeLinearV2Config, True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = RingLinearRules
    ModelRegistry.register_model(ARCHITECTURE, f"ring_linear_vllm.model:{ARCHITECTURE}")
