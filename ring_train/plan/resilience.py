"""Which keys of resilience contradict the run or each other."""

from ring_train.config import Config

SMALLEST_WINDOW = 4
"""Half of it must be there before a standard deviation means anything."""


def resilience_problems(config: Config) -> list[str]:
    """Return what is wrong with the policy for bad steps."""
    policy, num_steps = config.resilience, config.train.num_steps
    problems = []
    if policy.spike_sigma is not None and policy.spike_window_steps < SMALLEST_WINDOW:
        problems.append(
            f"resilience.spike_window_steps={policy.spike_window_steps} is below "
            f"{SMALLEST_WINDOW}, too few to judge spikes by; choose e.g. 128, or "
            "resilience.spike_sigma=null"
        )
    outside = sorted({step for step in policy.skip_steps if not 1 <= step <= num_steps})
    if outside:
        problems.append(
            f"resilience.skip_steps={outside} are no steps of this run; they are numbered from 1 "
            f"to train.num_steps={num_steps}, as in metrics.jsonl"
        )
    return problems
