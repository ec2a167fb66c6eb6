"""Which projections get a low-rank adapter, how many parameters that is, and what is wrong with it.

Names are megatron-core's, with `mlp.`, `experts.` or `shared_experts.` where several layers have a
projection of one name. An adapter is cut like the weight it belongs to and its rank is never cut,
so parallel sizes that divide the weights divide the adapters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite

from ring_train.config import Config, LoraConfig, ModelConfig
from ring_train.config.keys import nearest
from ring_train.plan.layers import LayerPlan, channel_mixers, token_mixers
from ring_train.plan.mixers import MTP_MIXERS


@dataclass(frozen=True, kw_only=True)
class LoraPlan:
    """The adapters of a run."""

    scale: float
    """What B (A x) is multiplied by: alpha / rank."""
    num_parameters: int
    """Of all adapters, those of MTP layers included."""


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The weights of one name in a layer."""

    inputs: int
    outputs: int
    count: int = 1
    """Weights of the name: one per expert."""


Projections = dict[str, Projection]


def _attention(model: ModelConfig, num_groups: int) -> Projections:
    heads = model.num_attention_heads * model.kv_channels
    qkv = heads + 2 * num_groups * model.kv_channels
    return {
        "linear_qkv": Projection(inputs=model.hidden_size, outputs=qkv),
        "linear_proj": Projection(inputs=heads, outputs=model.hidden_size),
    }


def _gqa(model: ModelConfig) -> Projections:
    return _attention(model, model.num_query_groups)


def _lightning(model: ModelConfig) -> Projections:
    heads = model.num_attention_heads * model.kv_channels
    gate = Projection(inputs=model.hidden_size, outputs=heads)
    return {**_attention(model, model.num_attention_heads), "linear_gate": gate}


def _mlp(prefix: str, model: ModelConfig, ffn_size: int, count: int = 1) -> Projections:
    width = model.hidden_size
    return {
        f"{prefix}.linear_fc1": Projection(inputs=width, outputs=2 * ffn_size, count=count),
        f"{prefix}.linear_fc2": Projection(inputs=ffn_size, outputs=width, count=count),
    }


def _dense(model: ModelConfig) -> Projections:
    return _mlp("mlp", model, model.ffn_hidden_size)


def _moe(model: ModelConfig) -> Projections:
    found = _mlp("experts", model, model.moe_ffn_hidden_size, model.num_moe_experts or 0)
    shared = model.moe_shared_expert_intermediate_size
    return found | (_mlp("shared_experts", model, shared) if shared else {})


PROJECTIONS: dict[str, Callable[[ModelConfig], Projections]] = {
    "gqa": _gqa,
    "lightning": _lightning,
    "dense": _dense,
    "moe": _moe,
}
"""Mixer -> its projections. A mixer that is not listed has none that could be adapted."""

TARGETS = (
    *("linear_qkv", "linear_proj", "linear_gate"),
    *(
        f"{part}.{name}"
        for part in ("mlp", "experts", "shared_experts")
        for name in ("linear_fc1", "linear_fc2")
    ),
)
"""What `lora.targets` may name."""


def make_lora(config: Config, layers: LayerPlan) -> LoraPlan | None:
    """Return the adapters of a run, None if all weights are trained."""
    lora = config.lora
    if lora.rank is None:
        return None
    return LoraPlan(
        scale=lora.alpha / lora.rank,
        num_parameters=sum(
            lora.rank * projection.count * (projection.inputs + projection.outputs)
            for name, projection in _all_projections(config.model, layers)
            if name in lora.targets
        ),
    )


def _all_projections(model: ModelConfig, layers: LayerPlan) -> Iterator[tuple[str, Projection]]:
    """Yield (name, projection) of every layer, MTP layers last."""
    pairs = [*zip(layers.token_mixers, layers.channel_mixers, strict=True)]
    for pair in [*pairs, *[MTP_MIXERS] * layers.num_mtp]:
        for mixer in pair:
            if mixer in PROJECTIONS:
                yield from PROJECTIONS[mixer](model).items()


def lora_problems(config: Config) -> list[str]:
    """Return what is wrong with the adapters of a run."""
    lora = config.lora
    if lora.rank is None:
        if not lora.targets:
            return []
        return [
            f"lora.targets=[{', '.join(lora.targets)}] without lora.rank, which is null; "
            "give a rank, or lora=none to train all weights"
        ]
    problems = _size_problems(lora, lora.rank) + _target_problems(config)
    if config.init_from is None:
        problems.append(
            f"lora.rank={lora.rank} trains adapters of a model whose weights init_from=null draws "
            "at random and nothing trains; give init_from=FOLDER, or lora=none"
        )
    return problems + _bias_problems(config)


def _size_problems(lora: LoraConfig, rank: int) -> list[str]:
    """Return which numbers are not what they can be."""
    values = {"lora.rank": rank, "lora.alpha": lora.alpha}
    return [
        f"{path}={value} is not positive and finite; choose a value above 0"
        for path, value in values.items()
        if not (value > 0 and isfinite(value))
    ]


def _target_problems(config: Config) -> list[str]:
    """Return which targets are unknown, repeated, or in no layer."""
    targets = config.lora.targets
    if not targets:
        return [
            "lora.targets=[] leaves nothing to train; "
            f"choose from {', '.join(TARGETS)}, or lora=attention"
        ]
    problems = [
        f"lora.targets={name} is not a projection that can be adapted{nearest(name, TARGETS)}; "
        f"choose from {', '.join(TARGETS)}"
        for name in sorted(set(targets) - set(TARGETS))
    ]
    problems += [
        f"lora.targets={name} is given {targets.count(name)} times; name it once"
        for name in sorted(set(targets))
        if targets.count(name) > 1
    ]
    model = config.model
    mixers = {*token_mixers(model), *channel_mixers(model)}
    mixers |= set(MTP_MIXERS) if model.mtp_num_layers else set()
    present = {name for mixer in mixers & PROJECTIONS.keys() for name in PROJECTIONS[mixer](model)}
    return problems + [
        f"lora.targets={name} is in no layer of this model ({', '.join(sorted(mixers))}); "
        f"remove it or choose from {', '.join(t for t in TARGETS if t in present)}"
        for name in sorted(set(targets) & set(TARGETS) - present)
    ]


def _bias_problems(config: Config) -> list[str]:
    """Return which keys move the expert biases, which lie beside the weights and no adapter holds.

    A run may leave the model's rate at anything if each of its phases says 0.
    """
    model, phases = config.model, config.phases
    if not model.moe_router_enable_expert_bias or "moe" not in channel_mixers(model):
        return []
    key = "moe_router_bias_update_rate"
    rates = {f"model.{key}": model.moe_router_bias_update_rate}
    if phases:
        inherited = [p for p in phases.values() if p.moe_router_bias_update_rate is None]
        rates = rates if inherited else {}
        rates |= {
            f"phases.{name}.{key}": phase.moe_router_bias_update_rate
            for name, phase in phases.items()
            if phase.moe_router_bias_update_rate is not None
        }
    return [
        f"{path}={rate:g} moves expert biases, but lora.rank={config.lora.rank} freezes all that "
        "is no adapter; set it to 0"
        for path, rate in rates.items()
        if rate
    ]
