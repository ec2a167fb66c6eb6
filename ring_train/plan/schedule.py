"""Lengths of the parts of the learning-rate schedule."""

from ring_train.config import Config, LrDecayStyle, OptimConfig


def warmup_steps(optim: OptimConfig, num_steps: int) -> int:
    """Return the steps of the warm-up; a fraction is rounded, and at least one step."""
    if optim.lr_warmup_fraction is None:
        return optim.lr_warmup_steps
    return max(round(optim.lr_warmup_fraction * num_steps), 1) if optim.lr_warmup_fraction else 0


def schedule_problems(config: Config) -> list[str]:
    """Return what is wrong with the learning-rate schedule."""
    optim, num_steps = config.optim, config.train.num_steps
    problems = []
    if optim.min_lr > optim.lr:
        problems.append(
            f"optim.min_lr={optim.min_lr} exceeds the peak optim.lr={optim.lr}; lower min_lr"
        )
    if optim.lr_warmup_fraction is not None and optim.lr_warmup_steps:
        problems.append(
            f"optim.lr_warmup_steps={optim.lr_warmup_steps} and optim.lr_warmup_fraction="
            f"{optim.lr_warmup_fraction} both give the warm-up; set one of them to 0 or null"
        )
    anneal = optim.wsd_decay_steps
    if optim.lr_decay_style is not LrDecayStyle.wsd:
        if anneal:
            problems.append(
                f"optim.wsd_decay_steps={anneal} belongs to the wsd schedule, but "
                f"optim.lr_decay_style={optim.lr_decay_style}; set it to 0 or choose wsd"
            )
        anneal = 0
    warmup = warmup_steps(optim, num_steps)
    if warmup + anneal > num_steps:
        problems.append(
            f"optim.lr_warmup_steps={warmup} + optim.wsd_decay_steps={anneal} "
            f"exceed train.num_steps={num_steps}; shorten them or train longer"
        )
    return problems
