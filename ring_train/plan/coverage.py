"""Which kinds of layout have been compared with one rank, and which are refused because none was.

`certified_layouts.json` is written by `make test-layouts`, which compares loss, every gradient and
the expert-bias update of each layout of a generated table with one fp32 rank (docs/layouts.md).
What counts is the kind, not the size: tp=8 pp=8 ep=64 is covered when tp=2 pp=2 ep=2 is.

A kind is the set of degrees above 1. Flags (recomputation, optimizer sharding, ...) are looked up
per kind: a layout is covered when its kind was compared, and each of its flags together with it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from ring_train.config import Config, ScoreFunction
from ring_train.plan.mesh import Mesh

TABLE_FILE = Path(__file__).parent / "certified_layouts.json"

DEGREE_NAMES = ("tp", "pp", "vpp", "ep", "etp", "cp", "dp")


@dataclass(frozen=True)
class Features:
    """What of a layout can be wrong by itself or together with the rest of it."""

    kind: tuple[str, ...]
    """Degrees above 1, in the order of DEGREE_NAMES."""
    flags: frozenset[str]

    @property
    def name(self) -> str:
        """The kind in one word: its degrees, or "one rank"."""
        return kind_name(self.kind)


def kind_name(kind: tuple[str, ...]) -> str:
    """Return a kind in one word."""
    return "+".join(kind) or "one rank"


def layout_features(config: Config, mesh: Mesh) -> Features:
    """Return the kind and the flags of a layout."""
    parallel, model = config.parallel, config.model
    recompute = parallel.recompute_granularity
    flags = {
        "no_sequence_parallel": mesh.tp > 1 and not mesh.sequence_parallel,
        "distributed_optimizer": parallel.use_distributed_optimizer,
        "overlap_grad_reduce": parallel.overlap_grad_reduce,
        "overlap_param_gather": parallel.overlap_param_gather,
        f"recompute_{recompute}": recompute is not None,
        "expert_data_parallel": mesh.ep * mesh.etp > 1 and mesh.edp > 1,
        "mtp": model.mtp_num_layers > 0,
        "softmax_router": model.moe_router_score_function is ScoreFunction.softmax,
        "balance_loss": model.moe_aux_loss_coeff > 0,
        "norm_head": model.norm_head,
        "megatron_fields": bool(model.megatron),
    }
    return Features(
        kind=tuple(name for name in DEGREE_NAMES if getattr(mesh, name) > 1),
        flags=frozenset(name for name, used in flags.items() if used),
    )


@functools.cache
def certified() -> dict[tuple[str, ...], frozenset[str]]:
    """Return {kind: flags that were compared together with it} as committed."""
    table = json.loads(TABLE_FILE.read_text(encoding="ascii"))
    return {tuple(row["kind"]): frozenset(row["flags"]) for row in table["kinds"]}


def coverage_problems(config: Config, mesh: Mesh) -> list[str]:
    """Return why a layout is not covered, with the nearest one that is."""
    if config.parallel.allow_uncertified:
        return []
    features, table = layout_features(config, mesh), certified()
    way_out = "or set parallel.allow_uncertified=true, which checkpoints record (docs/layouts.md)"
    if features.kind not in table:
        nearest = min(table, key=lambda kind: (len(set(kind) ^ set(features.kind)), kind))
        return [
            f"parallel: the kind {features.name} has not been compared with one rank; the nearest "
            f"that has is {kind_name(nearest)}; choose it, {way_out}"
        ]
    missing = sorted(features.flags - table[features.kind])
    if missing:
        return [
            f"parallel: {', '.join(missing)} has not been compared with one rank in the kind "
            f"{features.name}; the nearest that has is the same without it; leave it out, {way_out}"
        ]
    return []
