"""Which keys of activation recomputation go together."""

from ring_train.config import ParallelConfig, RecomputeGranularity
from ring_train.config.keys import nearest

MODULES = ("core_attn", "mlp", "moe", "shared_experts")
"""What selective recomputation may name. Of megatron-core's others, `layernorm` needs Transformer
Engine and a C++ compiler at run time, and the rest are not in this model."""


def recompute_problems(parallel: ParallelConfig) -> list[str]:
    """Return which keys of recomputation are missing, unknown, or contradict each other."""
    granularity = parallel.recompute_granularity
    given = {
        "recompute_method": parallel.recompute_method,
        "recompute_num_layers": parallel.recompute_num_layers,
        "recompute_modules": parallel.recompute_modules or None,
    }
    wanted: set[str] = set()
    if granularity is RecomputeGranularity.full:
        wanted = {"recompute_method", "recompute_num_layers"}
    elif granularity is RecomputeGranularity.selective:
        wanted = {"recompute_modules"}
    problems = [
        f"parallel.{key}={value} contradicts parallel.recompute_granularity={_word(granularity)}, "
        f"which {'reads only ' + ' and '.join(sorted(wanted)) if wanted else 'recomputes nothing'};"
        f" remove it or choose {'full' if key != 'recompute_modules' else 'selective'}"
        for key, value in given.items()
        if value is not None and key not in wanted
    ]
    problems += [
        f"parallel.recompute_granularity={granularity} needs parallel.{key}, which is not given; "
        f"choose {_CHOICES[key]}"
        for key in sorted(wanted)
        if given[key] is None
    ]
    return problems + [
        f"parallel.recompute_modules={name} is not a module that can be recomputed"
        f"{nearest(name, MODULES)}; choose from {', '.join(MODULES)}"
        for name in sorted(set(parallel.recompute_modules) - set(MODULES))
    ]


_CHOICES = {
    "recompute_method": "uniform or block",
    "recompute_num_layers": "1 or more",
    "recompute_modules": f"from {', '.join(MODULES)}",
}


def _word(granularity: RecomputeGranularity | None) -> str:
    return "null" if granularity is None else granularity.value
