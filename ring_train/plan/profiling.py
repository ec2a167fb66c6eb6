"""Which steps and ranks may be traced."""

from ring_train.config import LoggingConfig


def profiling_problems(logging: LoggingConfig, world_size: int) -> list[str]:
    """Return what is wrong with the steps and ranks to trace."""
    problems = []
    steps = logging.profile_steps
    if steps is not None and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        problems.append(
            f"logging.profile_steps={steps} is not [first, last] with 1 <= first <= last; "
            "name two steps of the run, as in [101,103]"
        )
    missing = [rank for rank in logging.profile_ranks if not 0 <= rank < world_size]
    if missing:
        problems.append(
            f"logging.profile_ranks={logging.profile_ranks}: {missing} are not among {world_size} "
            f"ranks; choose from 0 to {world_size - 1}"
        )
    return problems
