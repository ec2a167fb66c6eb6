"""Parameter and FLOP counts of a model, added up from its mixers (model-spec 1.3)."""

from dataclasses import dataclass

from ring_train.config import ModelConfig, Precision
from ring_train.plan.layers import LayerPlan
from ring_train.plan.mixers import CHANNEL_MIXERS, MTP_MIXERS, TOKEN_MIXERS

BACKWARD_FACTOR = 3
"""Forward and backward cost three forwards."""

WEIGHT_BYTES = {Precision.fp32: 4, Precision.bf16: 2}
TRAINED_BYTES = {Precision.fp32: 4 + 8, Precision.bf16: 4 + 4 + 8}
"""Of a trained weight, besides itself: fp32 gradient, fp32 copy if it is not fp32, two moments."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Counts of the whole model; MTP layers apart, expert biases included."""

    num_parameters: int
    num_active_parameters: int
    """Parameters that one token meets, embedding and output layer included."""
    num_active_non_embedding_parameters: int
    """The same without embedding and output layer."""
    num_mtp_parameters: int
    """All MTP layers; they share embedding and output layer."""
    num_active_mtp_parameters: int
    flops_per_token: float
    """Training FLOPs of one token: forward and backward, MTP included."""


def make_cost(model: ModelConfig, layers: LayerPlan, seq_length: int) -> Cost:
    """Return the counts of a legal layer pattern at one row length in tokens."""
    h, v = model.hidden_size, model.vocab_size
    total = active = 0
    forward_flops = tail_flops(model, seq_length)
    for token, channel in zip(layers.token_mixers, layers.channel_mixers, strict=True):
        for mixer in (TOKEN_MIXERS[token], CHANNEL_MIXERS[channel]):
            total += mixer.num_parameters(model)
            active += mixer.num_active_parameters(model)
        forward_flops += layer_flops(model, token, channel, seq_length)
    norms = (2 * model.num_layers + 1) * h
    embeddings = 2 * v * h
    mtp_total, mtp_active = _mtp_depth(model)
    return Cost(
        num_parameters=total + norms + embeddings,
        num_active_parameters=active + norms + embeddings,
        num_active_non_embedding_parameters=active + norms,
        num_mtp_parameters=layers.num_mtp * mtp_total,
        num_active_mtp_parameters=layers.num_mtp * mtp_active,
        flops_per_token=BACKWARD_FACTOR * forward_flops,
    )


def state_bytes(precision: Precision, num_weights: int, num_trained: int) -> tuple[int, int]:
    """Return bytes of (weights, gradients and optimizer), each held once over all ranks."""
    return num_weights * WEIGHT_BYTES[precision], num_trained * TRAINED_BYTES[precision]


def layer_flops(model: ModelConfig, token: str, channel: str, seq_length: int) -> float:
    """Return the forward FLOPs of one token in a layer of the named mixers."""
    mixers = (TOKEN_MIXERS[token], CHANNEL_MIXERS[channel])
    return sum(mixer.flops_per_token(model, seq_length) for mixer in mixers)


def tail_flops(model: ModelConfig, seq_length: int) -> float:
    """Return the forward FLOPs of one token after the layers: output layer and MTP depths."""
    h, v = model.hidden_size, model.vocab_size
    depth = layer_flops(model, *MTP_MIXERS, seq_length) + 2.0 * h * (2 * h + v)
    return 2.0 * h * v + (model.mtp_num_layers * depth if model.mtp_num_layers else 0)


def _mtp_depth(model: ModelConfig) -> tuple[int, int]:
    """Return parameters and active parameters of one MTP depth."""
    h = model.hidden_size
    mixers = (TOKEN_MIXERS[MTP_MIXERS[0]], CHANNEL_MIXERS[MTP_MIXERS[1]])
    own = 2 * h * h + 5 * h  # eh_proj; enorm, hnorm, final and the two norms of the layer
    return (
        own + sum(mixer.num_parameters(model) for mixer in mixers),
        own + sum(mixer.num_active_parameters(model) for mixer in mixers),
    )
