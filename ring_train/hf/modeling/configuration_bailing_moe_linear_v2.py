"""Config of the hybrid Ring-linear 2.0 family for transformers; it travels inside an export."""

from typing import Any, ClassVar

from .configuration_bailing_moe_v2 import BailingMoeV2Config


class BailingMoeLinearV2Config(BailingMoeV2Config):
    """What `config.json` of a BailingMoeLinearV2ForCausalLM folder says.

    `decay_layer_rule` may be given to `from_pretrained` instead; the model refuses to be built
    without it, because no tensor of a checkpoint says which rule it was trained with.
    """

    model_type = "bailing_moe_linear"

    required_keys: ClassVar[tuple[str, ...]] = (
        *BailingMoeV2Config.required_keys,
        "layer_group_size",
        "group_norm_size",
        "linear_silu",
    )
    only_values: ClassVar[dict[str, Any]] = {
        **BailingMoeV2Config.only_values,
        "linear_rope": True,
    }

    def __init__(self, **kwargs: Any) -> None:
        """Take every key of `config.json`."""
        self.decay_layer_rule = kwargs.pop("decay_layer_rule", None)
        super().__init__(**kwargs)
