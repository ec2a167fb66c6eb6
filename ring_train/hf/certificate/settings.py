"""What config.json says, against the trained model: keys, decay rates, positions, router, stops.

Unusual: the formulas of decay and position are written once more here, over the bare JSON, so that
a mistake in the code that trains or exports does not confirm itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ring_train.config import Architecture, ModelConfig, WeightFormat
from ring_train.hf.config import generation_config_dict, hf_config_dict, read_json
from ring_train.ops.decay import decay_slopes
from ring_train.ops.rope import rotary_angles
from ring_train.plan.layers import token_mixers

FREE_KEYS = frozenset({"transformers_version", "linear_backend"})
"""Keys that an export does not write and that mean nothing for the model."""
RELATIVE = 1e-6
"""Of decay rates and frequencies: they are rounded once to fp32."""
POSITIONS = (0, 1, 17, 63, 200)
ANGLE_TOLERANCE = 2e-5
"""Of cos and sin at these positions: an angle of 200 in fp32 is known to 1.5e-5."""
YARN_FAST_TURNS, YARN_SLOW_TURNS = 32, 1

Outcome = tuple[list[str], dict[str, Any]]


def compare_config(raw: dict[str, Any], wanted: dict[str, Any]) -> Outcome:
    """Return which keys of config.json are not what an export of the trained model says."""
    differences = [
        f"{key} is missing, not {value!r}"
        if key not in raw
        else f"{key} is {raw[key]!r}, not {value!r}"
        for key, value in wanted.items()
        if key not in raw or raw[key] != value
    ]
    dtype = wanted.get("torch_dtype")
    if raw.get("dtype", dtype) != dtype:
        differences.append(f"dtype is {raw['dtype']!r}, not {dtype!r} like torch_dtype")
    unknown = sorted(raw.keys() - wanted.keys() - FREE_KEYS - {"dtype"})
    differences += [f"{key} is {raw[key]!r}; an export does not write it" for key in unknown]
    return differences, {"num_keys": len(wanted)}


def compare_decay(
    raw: dict[str, Any], model: ModelConfig, slopes: Mapping[str, list[float]] | None
) -> Outcome:
    """Return which decay rates differ, of config.json and of the loaded model.

    Args:
        raw: config.json.
        model: as trained.
        slopes: of each linear layer (0-based, as text) of the model that transformers loaded.
    """
    differences = []
    linear = [i for i, mixer in enumerate(token_mixers(model)) if mixer == "lightning"]
    for layer in linear:
        trained = decay_slopes(
            model.num_attention_heads,
            layer,
            model.num_layers,
            model.decay_layer_rule.value,
            torch.float64,
        ).tolist()
        sources = {"config.json": config_slopes(raw, layer)}
        if slopes is not None:
            sources["the loaded model"] = slopes.get(str(layer), [])
        for source, found in sources.items():
            if not _close(found, trained):
                differences.append(
                    f"layer {layer}: decay rates of {source} begin {_begin(found)}, "
                    f"trained were {_begin(trained)}"
                )
    extra = sorted(set(slopes or {}) - {str(layer) for layer in linear})
    differences += [f"layer {layer} decays in the loaded model, not in training" for layer in extra]
    return differences, {"num_linear_layers": len(linear)}


def config_slopes(raw: dict[str, Any], layer: int) -> list[float]:
    """Return the decay rate of each head of a layer by config.json alone; none if it is softmax.

    Source: ALiBi slopes (arXiv 2108.12409) times 1 - p / (L - 1) + 1e-5, p = layer or layer - 1.
    """
    if (layer + 1) % raw.get("layer_group_size", 1) == 0:
        return []
    place = layer - {"zero_based": 0, "shifted": 1}[raw["decay_layer_rule"]]
    last = raw["num_hidden_layers"] - 1
    factor = 1 - (place / last if last else 0) + 1e-5
    return [rate * factor for rate in _alibi(raw["num_attention_heads"])]


def _alibi(heads: int) -> list[float]:
    power = 2 ** math.floor(math.log2(heads))
    rates = [2 ** (-8 * head / power) for head in range(1, power + 1)]
    return rates if power == heads else rates + _alibi(2 * power)[::2][: heads - power]


def compare_rope(
    raw: dict[str, Any], model: ModelConfig, table: Mapping[str, list[list[float]]] | None
) -> Outcome:
    """Return how positions differ, by config.json and in the loaded model.

    Args:
        raw: config.json.
        model: as trained.
        table: cos and sin of the loaded model at POSITIONS, [positions][rotary dims].
    """
    rotary = int(model.kv_channels * model.rotary_percent)
    original = model.original_max_position_embeddings
    stretched = model.rotary_scaling_factor != 1
    assert original is not None or not stretched
    yarn = (model.rotary_scaling_factor, original or 0) if stretched else None
    positions = torch.tensor(POSITIONS)
    angles = rotary_angles(positions, rotary, model.rotary_base, torch.float64, yarn)
    frequencies, scale = config_frequencies(raw)
    sources = {"config.json": _cos_sin(frequencies, scale)}
    if table is not None:
        sources["the loaded model"] = (table["cos"], table["sin"])
    differences = []
    for source, found in sources.items():
        for name, values, wanted in zip(("cos", "sin"), found, angles, strict=True):
            got = torch.tensor(values, dtype=torch.float64)
            if got.shape != wanted.shape:
                differences.append(f"{source} turns {got.shape[-1]} channels, training {rotary}")
            elif not bool(((got - wanted).abs() <= ANGLE_TOLERANCE).all()):
                worst = float((got - wanted).abs().max())
                differences.append(f"{name} of positions in {source} differs by up to {worst:.3g}")
    return differences, {"rotary_dims": rotary, "yarn_factor": model.rotary_scaling_factor}


def config_frequencies(raw: dict[str, Any]) -> tuple[list[float], float]:
    """Return the frequency of each pair of channels and the factor of cos and sin, by config.json.

    Source: B. Peng et al., YaRN, arXiv 2309.00071, equations 17, 20 to 23.
    """
    # The first generation has neither key: heads fill the width, and all channels turn.
    width = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    rotary = int(width * raw.get("partial_rotary_factor", 1))
    theta = raw["rope_theta"]
    plain = [theta ** (-2 * pair / rotary) for pair in range(rotary // 2)]
    yarn = raw.get("rope_scaling")
    if yarn is None:
        return plain, 1.0
    factor, context = yarn["factor"], yarn["original_max_position_embeddings"]
    # The pair of channels that turns so often over the original context.
    fast, slow = (
        rotary * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (YARN_FAST_TURNS, YARN_SLOW_TURNS)
    )
    first, last = max(math.floor(fast), 0), min(math.ceil(slow), rotary - 1)
    width = last - first if last > first else 0.001
    shares = [min(max((pair - first) / width, 0.0), 1.0) for pair in range(rotary // 2)]
    mixed = [f * (1 - s) + f / factor * s for f, s in zip(plain, shares, strict=True)]
    return mixed, 0.1 * math.log(factor) + 1


def _cos_sin(frequencies: list[float], scale: float) -> tuple[list[list[float]], list[list[float]]]:
    angles = [[position * f for f in (*frequencies, *frequencies)] for position in POSITIONS]
    return (
        [[scale * math.cos(angle) for angle in row] for row in angles],
        [[scale * math.sin(angle) for angle in row] for row in angles],
    )


ROUTER_KEYS = (
    *("num_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob"),
    *("score_function", "routed_scaling_factor", "moe_router_enable_expert_bias", "router_dtype"),
    *("num_shared_experts", "moe_shared_expert_intermediate_size", "norm_softmax"),
)
"""Keys that decide which experts a token gets, and with what weight."""


def compare_router(
    raw: dict[str, Any],
    model: ModelConfig,
    digests: Mapping[str, str],
    biases: Mapping[str, Mapping[str, str]] | None,
    *,
    loads_mtp: bool,
) -> Outcome:
    """Return how routing differs, by config.json and in the loaded model.

    Args:
        raw: config.json.
        model: as trained.
        digests: of the tensors of the folder.
        biases: {"dtype", "sha256"} of the expert biases that transformers loaded, in the dtype of
            the folder, by name.
        loads_mtp: whether MTP layers are in the files that transformers loads.
    """
    wanted = hf_config_dict(model, weights=WeightFormat.fp32)
    differences = [
        f"{key} is {raw.get(key)!r}, trained was {wanted[key]!r}"
        for key in ROUTER_KEYS
        if key in wanted and raw.get(key) != wanted[key]
    ]
    names = sorted(name for name in digests if name.endswith(".expert_bias"))
    num_moe = model.num_layers - model.first_k_dense_replace + model.mtp_num_layers
    expected = num_moe if model.moe_router_enable_expert_bias else 0
    if len(names) != expected:
        differences.append(f"{len(names)} layers have an expert bias, {expected} had in training")
    if biases is not None:
        num_loaded = model.num_layers + (model.mtp_num_layers if loads_mtp else 0)
        for name in (name for name in names if int(name.split(".")[2]) < num_loaded):
            loaded = biases.get(name, {"dtype": "missing", "sha256": ""})
            if loaded["dtype"] != "torch.float32":
                differences.append(f"{name} is {loaded['dtype']} in the loaded model, not fp32")
            elif loaded["sha256"] != digests[name]:
                differences.append(f"{name} is not what the folder holds in the loaded model")
    return differences, {"num_biases": len(names)}


def compare_generation(folder: Path, model: ModelConfig, end_of_turn: int | None) -> Outcome:
    """Return what generation_config.json says otherwise than an export: stops and any other key.

    Args:
        folder: Hugging Face folder.
        model: as trained.
        end_of_turn: special token after an answer, if the chat template writes one.

    Raises:
        HfError: the file cannot be read.
    """
    raw = read_json(folder / "generation_config.json")
    wanted = generation_config_dict(model)
    stops = raw.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    needed = {model.eos_token_id: "ends a document", end_of_turn: "ends a turn of chat"}
    differences = [
        f"eos_token_id is {stops}; it lacks {token}, which {what}"
        for token, what in needed.items()
        if token is not None and token not in stops
    ]
    differences += [
        f"eos_token_id holds {token}, which ends nothing in training"
        for token in stops
        if token not in needed
    ]
    differences += [
        f"{key} is {raw.get(key)!r}, not {wanted.get(key)!r}"
        for key in ("bos_token_id", "pad_token_id")
        if raw.get(key) != wanted.get(key)
    ]
    differences += [
        f"{key} is {raw[key]!r}; an export does not write it"
        for key in sorted(raw.keys() - wanted.keys() - FREE_KEYS - {"bos_token_id"})
    ]
    return differences, {"stop_tokens": stops}


def is_linear(model: ModelConfig) -> bool:
    """Return whether a folder of the model has linear layers."""
    return model.architecture == Architecture.bailing_moe_linear_v2


def _close(found: list[float], wanted: list[float]) -> bool:
    return len(found) == len(wanted) and all(
        abs(one - other) <= RELATIVE * abs(other) for one, other in zip(found, wanted, strict=True)
    )


def _begin(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values[:3]) + "]"
