"""Continue a prompt: `python -m ring_train.jobs.generate hf_dir=DIR prompt=TEXT`."""

import sys

from ring_train.config import compose
from ring_train.hf.continuation import continue_prompt
from ring_train.runtime.errors import run_job


def main() -> None:
    """Print the prompt and what the exported model writes after it."""
    config = compose("generate", sys.argv[1:])
    sys.stdout.write(continue_prompt(config) + "\n")


if __name__ == "__main__":
    run_job(main)
