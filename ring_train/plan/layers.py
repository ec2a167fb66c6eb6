"""Which mixers each layer has."""

from dataclasses import dataclass

from ring_train.config import Architecture, ModelConfig
from ring_train.config.keys import nearest
from ring_train.plan.mesh import Mesh, tensor_split_problems
from ring_train.plan.mixers import CHANNEL_MIXERS, MTP_MIXERS, TOKEN_MIXERS, Mixer
from ring_train.plan.problems import indivisible


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """The layer pattern; indices are 0-based and global."""

    token_mixers: tuple[str, ...]
    channel_mixers: tuple[str, ...]
    num_mtp: int
    """MTP depths, held by the last pipeline stage."""


def make_layers(model: ModelConfig) -> LayerPlan:
    """Return the layer pattern."""
    return LayerPlan(
        token_mixers=token_mixers(model),
        channel_mixers=channel_mixers(model),
        num_mtp=model.mtp_num_layers,
    )


def token_mixers(model: ModelConfig) -> tuple[str, ...]:
    """Return one token mixer per layer: the last of each layer group is softmax attention."""
    if model.token_mixers is not None:
        return tuple(model.token_mixers)
    group = model.layer_group_size
    return tuple("lightning" if (i + 1) % group else "gqa" for i in range(model.num_layers))


def channel_mixers(model: ModelConfig) -> tuple[str, ...]:
    """Return one channel mixer per layer: leading ones dense, the others MoE where there is any."""
    if model.channel_mixers is not None:
        return tuple(model.channel_mixers)
    if model.num_moe_experts is None:
        return ("dense",) * model.num_layers
    return tuple(
        "dense" if i < model.first_k_dense_replace else "moe" for i in range(model.num_layers)
    )


def layer_problems(model: ModelConfig, mesh: Mesh) -> list[str]:
    """Return what is wrong with the layer pattern and its mixers."""
    problems = indivisible(
        "model.num_layers",
        model.num_layers,
        "model.layer_group_size",
        model.layer_group_size,
    )
    if model.first_k_dense_replace > model.num_layers:
        problems.append(
            f"model.first_k_dense_replace={model.first_k_dense_replace} exceeds "
            f"model.num_layers={model.num_layers}; at most every layer is dense"
        )
    problems += _pattern_problems("token_mixers", token_mixers(model), TOKEN_MIXERS, model)
    problems += _pattern_problems("channel_mixers", channel_mixers(model), CHANNEL_MIXERS, model)
    return problems + _mixer_problems(model, mesh) + _width_problems(model, mesh)


def _mixer_problems(model: ModelConfig, mesh: Mesh) -> list[str]:
    """Return what the mixers in use cannot do, those of MTP layers included."""
    problems = []
    used_tokens, used_channels = set(token_mixers(model)), set(channel_mixers(model))
    if model.mtp_num_layers:
        used_tokens.add(MTP_MIXERS[0])
        used_channels.add(MTP_MIXERS[1])
    for used, registry in (
        (used_tokens, TOKEN_MIXERS),
        (used_channels, CHANNEL_MIXERS),
    ):
        for name in sorted(used & registry.keys()):
            problems += registry[name].problems(model, mesh)
    degrees = {"expert_model_parallel_size": mesh.ep, "expert_tensor_parallel_size": mesh.etp}
    if "moe" in used_channels:
        width, by = model.moe_ffn_hidden_size, "parallel.expert_tensor_parallel_size"
        problems += indivisible("model.moe_ffn_hidden_size", width, by, mesh.etp)
    else:
        problems += [
            f"parallel.{name}={degree}, but no layer is MoE; use 1"
            for name, degree in degrees.items()
            if degree > 1
        ]
    if "lightning" in used_tokens and model.architecture is not Architecture.bailing_moe_linear_v2:
        problems.append(
            f"model.architecture={model.architecture} has no lightning layers; use "
            f"{Architecture.bailing_moe_linear_v2}, or model.layer_group_size=1"
        )
    return problems


def _pattern_problems(
    field: str, pattern: tuple[str, ...], registry: dict[str, Mixer], model: ModelConfig
) -> list[str]:
    """Return what is wrong with a list of one mixer per layer."""
    problems = [
        f"model.{field}={name} is not registered{nearest(name, registry)}; "
        f"choose from {', '.join(sorted(registry))}"
        for name in sorted(set(pattern) - registry.keys())
    ]
    if len(pattern) != model.num_layers:
        problems.append(
            f"model.{field} names {len(pattern)} layers, not model.num_layers="
            f"{model.num_layers}; name one mixer per layer"
        )
    return problems


def _width_problems(model: ModelConfig, mesh: Mesh) -> list[str]:
    """Return what is wrong with widths that every layer shares."""
    problems = tensor_split_problems(
        {
            "model.hidden_size": model.hidden_size,
            "model.num_attention_heads": model.num_attention_heads,
            "model.vocab_size": model.vocab_size,
        },
        mesh.tp,
    )
    rotary_channels = model.kv_channels * model.rotary_percent
    if rotary_channels % 2:
        problems.append(
            f"model.rotary_percent={model.rotary_percent} of model.kv_channels="
            f"{model.kv_channels} rotates {rotary_channels:g} channels; they must pair up, "
            "choose an even number"
        )
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        token = getattr(model, name)
        if token is not None and not 0 <= token < model.vocab_size:
            problems.append(
                f"model.{name}={token} is outside model.vocab_size={model.vocab_size}; "
                "choose an id of the vocabulary"
            )
    return problems
