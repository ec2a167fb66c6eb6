"""Which steps read which samples, in which sizes and shares: the run as a list of phases.

A run without `phases` is one phase of train.num_steps. Samples are rows; they are numbered through
the whole run, whatever their length.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, isfinite, lcm

from ring_train.config import BatchRampConfig, Config, Packing, PhaseConfig
from ring_train.config.keys import nearest
from ring_train.plan.batch import BatchPlan, make_batch, size_problems
from ring_train.plan.mesh import Mesh

ONLY_PHASE = "train"
"""Name of the phase of a run without `phases`."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a phase says, with nulls replaced by what the run says."""

    name: str
    path: str
    """Where its keys are, for messages."""
    tokens: dict[str, int]
    num_steps: int | None
    weights: dict[str, float]
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    batch_ramp: BatchRampConfig | None
    rotary_base: float
    rotary_scaling_factor: float
    moe_router_bias_update_rate: float


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of steps that differ in the batch size only."""

    name: str
    first_step: int
    """Counted from 0, like every step here."""
    num_steps: int
    first_sample: int
    num_samples: int
    batch: BatchPlan
    """Sizes at the full batch size."""
    ramp: tuple[tuple[int, int, int], ...]
    """(first step, first sample, rows of a step), ascending; the last is the full batch size."""
    shares: dict[str, int]
    """Rows of each domain in lowest terms; with a token budget they add up to num_samples."""
    rotary_base: float
    rotary_scaling_factor: float
    moe_router_bias_update_rate: float

    @property
    def num_tokens(self) -> int:
        """Tokens of the phase, padding of packed rows included."""
        return self.num_samples * self.batch.seq_length


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one step reads."""

    phase: Phase
    first_sample: int
    global_batch_size: int
    num_micro_batches: int

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return self.global_batch_size * self.phase.batch.seq_length


def step_plan(phases: tuple[Phase, ...], step: int) -> StepPlan:
    """Return what a step reads; one past the end reads what the last phase would go on with."""
    phase = phases[bisect_right([phase.first_step for phase in phases], step) - 1]
    first_step, first_sample, rows = phase.ramp[
        bisect_right([stage[0] for stage in phase.ramp], step) - 1
    ]
    rows_per_pass = phase.batch.global_batch_size // phase.batch.num_micro_batches
    return StepPlan(
        phase=phase,
        first_sample=first_sample + (step - first_step) * rows,
        global_batch_size=rows,
        num_micro_batches=rows // rows_per_pass,
    )


def make_phases(config: Config, mesh: Mesh) -> tuple[Phase, ...]:
    """Return the phases; exact where `phase_problems` finds nothing."""
    phases: list[Phase] = []
    step = sample = 0
    for sizes in phase_sizes(config):
        num_steps, _ = length_of(sizes)
        ramp = tuple(_ramp(sizes, step, sample, num_steps))
        last_step, last_sample, rows = ramp[-1]
        num_samples = last_sample + (step + num_steps - last_step) * rows - sample
        phases.append(
            Phase(
                name=sizes.name,
                first_step=step,
                num_steps=num_steps,
                first_sample=sample,
                num_samples=num_samples,
                batch=make_batch(sizes, mesh),
                ramp=ramp,
                shares=_shares(sizes, config),
                rotary_base=sizes.rotary_base,
                rotary_scaling_factor=sizes.rotary_scaling_factor,
                moe_router_bias_update_rate=sizes.moe_router_bias_update_rate,
            )
        )
        step, sample = step + num_steps, sample + num_samples
    return tuple(phases)


def phase_problems(config: Config, mesh: Mesh) -> list[str]:
    """Return what is wrong with lengths, sizes and budgets of the phases."""
    problems = []
    total = 0
    for sizes in phase_sizes(config):
        found = [*_mixture_problems(sizes, config), *_ramp_problems(sizes, mesh)]
        found += size_problems(sizes, config.model, mesh)
        problems += found
        num_steps, rest = length_of(sizes) if not found else (0, 0)
        total += num_steps
        if rest:
            problems.append(_budget_problem(sizes, rest))
    if config.phases and not problems and total != config.train.num_steps:
        problems.append(
            f"train.num_steps={config.train.num_steps} is not the sum of the phases; "
            f"set train.num_steps={total}"
        )
    return problems + _packing_problems(config)


def phase_sizes(config: Config) -> list[Sizes]:
    """Return what each phase says, with nulls replaced by what the run says."""
    if not config.phases:
        only = PhaseConfig(num_steps=config.train.num_steps)
        return [_sizes(config, ONLY_PHASE, "train", only)]
    if list(config.phases) == [ONLY_PHASE]:  # the phase of a run in epochs
        return [_sizes(config, ONLY_PHASE, "train", config.phases[ONLY_PHASE])]
    return [_sizes(config, name, f"phases.{name}", phase) for name, phase in config.phases.items()]


def length_of(sizes: Sizes) -> tuple[int, int]:
    """Return (steps of a phase, rows of its budget that do not fill the last one)."""
    if not sizes.tokens:
        return sizes.num_steps or 0, 0
    rows = sum(sizes.tokens.values()) // sizes.seq_length
    steps = 0
    if sizes.batch_ramp is not None:
        for size in ramp_sizes(sizes):
            taken = min(sizes.batch_ramp.steps, rows // size)
            steps, rows = steps + taken, rows - taken * size
            if taken < sizes.batch_ramp.steps:
                return steps, rows
    return steps + rows // sizes.global_batch_size, rows % sizes.global_batch_size


def integer_shares(weights: list[float]) -> list[int]:
    """Return the smallest integers in the proportion of the weights.

    Weights count as the decimal numbers that they print as: 0.35, 0.25, 0.4 give 7, 5, 8.
    """
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    integers = [int(fraction * scale) for fraction in fractions]
    divisor = gcd(*integers) or 1
    return [integer // divisor for integer in integers]


def _sizes(config: Config, name: str, path: str, phase: PhaseConfig) -> Sizes:
    train, model = config.train, config.model

    def given[T](value: T | None, otherwise: T) -> T:
        return otherwise if value is None else value

    return Sizes(
        name=name,
        path=path,
        tokens=phase.tokens,
        num_steps=phase.num_steps,
        weights=phase.weights or {key: d.weight for key, d in config.data.domains.items()},
        seq_length=given(phase.seq_length, train.seq_length),
        micro_batch_size=given(phase.micro_batch_size, train.micro_batch_size),
        global_batch_size=given(phase.global_batch_size, train.global_batch_size),
        batch_ramp=phase.batch_ramp,
        rotary_base=given(phase.rotary_base, model.rotary_base),
        rotary_scaling_factor=given(phase.rotary_scaling_factor, model.rotary_scaling_factor),
        moe_router_bias_update_rate=given(
            phase.moe_router_bias_update_rate, model.moe_router_bias_update_rate
        ),
    )


def _shares(sizes: Sizes, config: Config) -> dict[str, int]:
    """Return the rows of each domain in lowest terms, by sorted name."""
    names = sorted(config.data.domains)
    if not names:
        return {}
    if sizes.tokens:
        rows = [sizes.tokens.get(name, 0) // sizes.seq_length for name in names]
        divisor = gcd(*rows) or 1
        return {name: count // divisor for name, count in zip(names, rows, strict=True)}
    shares = integer_shares([sizes.weights.get(name, 0.0) for name in names])
    return dict(zip(names, shares, strict=True))


def _ramp(sizes: Sizes, step: int, sample: int, num_steps: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first step, first sample, rows of a step) of each batch size."""
    end = step + num_steps
    if sizes.batch_ramp is not None:
        for rows in ramp_sizes(sizes):
            if step < end:
                yield step, sample, rows
            taken = min(sizes.batch_ramp.steps, end - step)
            step, sample = step + taken, sample + taken * rows
    if step < end or sizes.batch_ramp is None:
        yield step, sample, sizes.global_batch_size


def ramp_sizes(sizes: Sizes) -> range:
    """Return the rows of a step while the batch grows; empty without a ramp."""
    ramp = sizes.batch_ramp
    if ramp is None:
        return range(0)
    return range(ramp.start, sizes.global_batch_size, max(1, ramp.increment))


def _mixture_problems(sizes: Sizes, config: Config) -> list[str]:
    """Return what is wrong with the length and the domains of a phase."""
    if not config.phases:
        return []  # train and data.domains are checked by themselves
    problems = _length_problems(sizes) + _rope_problems(sizes)
    domains = config.data.domains
    for key, entries in (("tokens", sizes.tokens), ("weights", sizes.weights)):
        for name, value in entries.items():
            path = f"{sizes.path}.{key}.{name}={value}"
            if name not in domains:
                problems.append(
                    f"{path}: no such domain{nearest(name, domains) or '; data.domains is empty'}"
                )
            elif not (value >= 0 and isfinite(value)):
                problems.append(f"{path} is not 0 or more; remove it to leave the domain out")
    if problems:
        return problems
    if domains and not any((sizes.tokens or sizes.weights).values()):
        key = "tokens" if sizes.tokens else "weights"
        problems.append(f"{sizes.path}.{key} are all 0: nothing to sample; give one domain a share")
    return problems + [
        f"{sizes.path}.tokens.{name}={tokens} is not a whole number of rows of "
        f"seq_length={sizes.seq_length}; write {tokens - tokens % sizes.seq_length} or "
        f"{tokens - tokens % sizes.seq_length + sizes.seq_length}"
        for name, tokens in sizes.tokens.items()
        if tokens % sizes.seq_length
    ]


def _length_problems(sizes: Sizes) -> list[str]:
    """Return what is wrong with how a phase says its length."""
    if sizes.num_steps is None:
        if sizes.tokens:
            return []
        return [f"{sizes.path}: nothing gives its length; add num_steps, or tokens of each domain"]
    if sizes.tokens:
        return [
            f"{sizes.path}: tokens and num_steps={sizes.num_steps} both give its length; "
            "keep the token budgets, or num_steps with weights"
        ]
    if sizes.num_steps < 1:
        return [f"{sizes.path}.num_steps={sizes.num_steps} is not positive; choose 1 or more"]
    return []


def _rope_problems(sizes: Sizes) -> list[str]:
    """Return which numbers of position embedding and router are not what they can be."""
    problems = []
    if not (sizes.rotary_base > 1 and isfinite(sizes.rotary_base)):
        problems.append(
            f"{sizes.path}.rotary_base={sizes.rotary_base} is not above 1; choose e.g. 600000"
        )
    rate = sizes.moe_router_bias_update_rate
    if not (rate >= 0 and isfinite(rate)):
        problems.append(
            f"{sizes.path}.moe_router_bias_update_rate={rate} is not 0 or more; choose e.g. 0.001"
        )
    return problems


def _ramp_problems(sizes: Sizes, mesh: Mesh) -> list[str]:
    ramp = sizes.batch_ramp
    if ramp is None:
        return []
    problems = [
        f"{sizes.path}.batch_ramp.{key}={value} is not positive; choose 1 or more"
        for key, value in vars(ramp).items()
        if value < 1
    ]
    if problems:
        return problems
    rows = sizes.micro_batch_size * mesh.dp
    for key, value in (("start", ramp.start), ("increment", ramp.increment)):
        if value % rows:
            problems.append(
                f"{sizes.path}.batch_ramp.{key}={value} is not divisible by micro_batch_size="
                f"{sizes.micro_batch_size} * data-parallel size {mesh.dp}; "
                f"choose a multiple of {rows}"
            )
    if ramp.start > sizes.global_batch_size or (
        (sizes.global_batch_size - ramp.start) % ramp.increment
    ):
        problems.append(
            f"{sizes.path}.batch_ramp: {ramp.start} and steps of {ramp.increment} do not reach "
            f"global_batch_size={sizes.global_batch_size}; choose an increment that divides the "
            "difference"
        )
    return problems


def _budget_problem(sizes: Sizes, rest: int) -> str:
    rows = sum(sizes.tokens.values()) // sizes.seq_length
    return (
        f"{sizes.path}.tokens add up to {rows} rows of {sizes.seq_length} tokens, {rest} more than "
        f"whole steps of global_batch_size={sizes.global_batch_size}; take {rest} rows "
        f"({rest * sizes.seq_length} tokens) from a domain, or change the batch size"
    )


def _packing_problems(config: Config) -> list[str]:
    """Return what is wrong with packed rows: each domain is packed for one length."""
    if config.data.packing is Packing.contiguous:
        return []
    problems = []
    if not config.data.document_isolation:
        problems.append(
            f"data.packing={config.data.packing} pads rows, which only isolated documents can "
            "ignore; set data.document_isolation=true or data.packing=contiguous"
        )
    lengths: dict[str, set[int]] = {}
    for sizes in phase_sizes(config):
        for name, value in (sizes.tokens or sizes.weights).items():
            if value:
                lengths.setdefault(name, set()).add(sizes.seq_length)
    return problems + [
        f"data.packing={config.data.packing} packs data.domains.{name} for one row length, but "
        f"the phases read it in rows of {sorted(found)} tokens; give the phases domains of their "
        "own, or set data.packing=contiguous"
        for name, found in lengths.items()
        if len(found) > 1
    ]
