"""The folder formats: what each family is called and what its `config.json` can express."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ring_train.config import Architecture, ModelConfig, ScoreFunction
from ring_train.hf.errors import HfError
from ring_train.plan.layers import channel_mixers, token_mixers

MODELING_DIR = Path(__file__).parent / "modeling"
"""Holds the Python files that travel inside an export."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of one folder format."""

    architecture: str
    """`architectures[0]`, the class of the model."""
    model_type: str
    config_class: str
    module: str
    """Ending of `configuration_*.py` and `modeling_*.py`."""
    modules: tuple[str, ...]
    """Endings of all files that an export needs."""

    @property
    def auto_map(self) -> dict[str, str]:
        """What transformers loads from the folder."""
        return {
            "AutoConfig": f"configuration_{self.module}.{self.config_class}",
            "AutoModelForCausalLM": f"modeling_{self.module}.{self.architecture}",
        }

    @property
    def modeling_files(self) -> tuple[Path, ...]:
        """The Python files that travel inside an export."""
        kinds = ("configuration", "modeling")
        return tuple(
            MODELING_DIR / f"{kind}_{module}.py" for kind in kinds for module in self.modules
        )


FAMILIES = {
    Architecture.bailing_moe: Family(
        architecture="BailingMoeForCausalLM",
        model_type="bailing_moe",
        config_class="BailingMoeConfig",
        module="bailing_moe",
        modules=(),
    ),
    Architecture.bailing_moe_v2: Family(
        architecture="BailingMoeV2ForCausalLM",
        model_type="bailing_moe",
        config_class="BailingMoeV2Config",
        module="bailing_moe_v2",
        modules=("bailing_moe_v2",),
    ),
    Architecture.bailing_moe_linear_v2: Family(
        architecture="BailingMoeLinearV2ForCausalLM",
        model_type="bailing_moe_linear",
        config_class="BailingMoeLinearV2Config",
        module="bailing_moe_linear_v2",
        modules=("bailing_moe_v2", "bailing_moe_linear_v2"),
    ),
}


def family_of(path: Path, raw: dict[str, Any]) -> Architecture:
    """Return the family that a parsed `config.json` names in `architectures[0]`."""
    names = raw.get("architectures")
    known = {family.architecture: key for key, family in FAMILIES.items()}
    if not isinstance(names, list) or not names or names[0] not in known:
        raise HfError(
            f"{path}: architectures={names!r}; its first must be one of {', '.join(known)}"
        )
    return known[names[0]]


def family_problems(model: ModelConfig) -> list[str]:
    """Return what keeps a model from being written in the format of its family, one line each."""
    if model.architecture == Architecture.bailing_moe:
        return ["only the V2 families can be written"]
    group = model.layer_group_size
    wanted_tokens = tuple(
        "lightning" if (index + 1) % group else "gqa" for index in range(model.num_layers)
    )
    wanted_channels = tuple(
        "dense" if index < model.first_k_dense_replace else "moe"
        for index in range(model.num_layers)
    )
    is_linear = model.architecture == Architecture.bailing_moe_linear_v2
    shared = model.num_shared_experts
    groups, kept = model.moe_router_num_groups or 1, model.moe_router_group_topk or 1
    facts = {
        "token mixers do not follow model.layer_group_size": token_mixers(model) != wanted_tokens,
        f"model.layer_group_size={group}, but all layers are softmax": not is_linear and group > 1,
        "channel mixers do not follow model.first_k_dense_replace": (
            channel_mixers(model) != wanted_channels
        ),
        "it has no experts": model.num_moe_experts is None,
        "it has no shared expert": not shared or not model.moe_shared_expert_intermediate_size,
        "the shared experts do not divide their width": bool(
            shared and (model.moe_shared_expert_intermediate_size or 0) % shared
        ),
        "model.moe_router_topk must be 2 * model.moe_router_group_topk": (
            1 < groups != kept and model.moe_router_topk != 2 * kept
        ),
        "the router is not a sigmoid with expert bias": (
            model.moe_router_score_function != ScoreFunction.sigmoid
            or not model.moe_router_enable_expert_bias
        ),
        "model.qk_layernorm=false": not model.qk_layernorm,
        "model.norm_head=true": model.norm_head,
    }
    return [text for text, is_wrong in facts.items() if is_wrong]
