"""Curate documents by a chain of steps: `python -m data_pipeline.curate curation=NAME ...`.

Keys: data_pipeline.curation.arguments.Curate. Presets of steps: conf/curation, or a YAML file of
your own. docs/data-curation.md walks through one.
"""

import functools
import logging
import sys

from data_pipeline.config import compose, run_command
from data_pipeline.curation.arguments import Curate


def main() -> int:
    """Curate and return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parse = functools.partial(compose, root="curate", group="curation")
    return run_command(Curate, _curate, parse)


def _curate(config: Curate) -> None:
    from data_pipeline.curation.chain import curate

    curate(config)


if __name__ == "__main__":
    sys.exit(main())
