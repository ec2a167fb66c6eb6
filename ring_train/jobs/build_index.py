"""Build what a run maps, and check its mixture: `python -m ring_train.jobs.build_index`.

Takes the words of `pretrain`, with `job=sft` those of `sft`, and WORLD_SIZE from the environment
(otherwise the fewest ranks that hold the model). One process without accelerator; a run that finds
the files in data.index_dir starts at once, one that does not builds them itself.
"""

import os
import sys
import time

from ring_train.config import Config
from ring_train.jobs.run_config import run_config
from ring_train.jobs.run_length import with_num_steps
from ring_train.plan import make_plan, smallest_world
from ring_train.runtime.errors import run_job


def main(overrides: list[str]) -> None:
    """Build the index of the run that the overrides describe and print its mixture."""
    config: Config = run_config("build_index", overrides)
    world_size = int(os.environ.get("WORLD_SIZE", smallest_world(config.parallel)))
    plan = make_plan(with_num_steps(config), world_size)

    from ring_train.data.loader import build_batches
    from ring_train.jobs.mixture_table import mixture_table

    started = time.monotonic()
    batches = build_batches(plan)
    for name, stream in batches.mixture.streams.items():
        epochs = batches.mixture.epochs()[name]
        for epoch in range(1, int(epochs) + 1):
            stream.pieces(epoch * stream.epoch_length, plan.batch.seq_length)
    sys.stdout.write(mixture_table(batches.mixture))
    sys.stdout.write(f"index ready after {time.monotonic() - started:.2f} s\n")


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
