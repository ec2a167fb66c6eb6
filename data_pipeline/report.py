"""Write a page about data: `python -m data_pipeline.report output=FILE.html curation=DIR ...`.

Any of the sources may be missing. The page is one file and needs no network.
"""

import dataclasses
import logging
import sys
from pathlib import Path

from data_pipeline.config import PipelineError, run_command

logger = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class Report:
    """Arguments."""

    output: str
    """The page, e.g. data.html."""
    curation: str = ""
    """Folders that data_pipeline.curate wrote, separated by commas."""
    shards: str = ""
    """Quoted globs of manifests, PREFIX.json, separated by commas."""
    run: str = ""
    """Folder of a training run; its ledger.jsonl is read, if there is one."""


def main() -> int:
    """Write the page and return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_command(Report, write_report)


def write_report(arguments: Report) -> None:
    """Write the page under a temporary name, then rename it into place.

    Raises:
        PipelineError: nothing to report on, or a file that is not what it should be.
    """
    from data_pipeline.reporting.page import curation_sections, render, run_sections, shard_sections
    from data_pipeline.reporting.records import read_curation, read_ledger, read_shards

    if not (arguments.curation or arguments.shards or arguments.run):
        raise PipelineError("nothing to report on; give curation=DIR, shards=GLOB or run=DIR")
    sections = []
    for folder in filter(None, arguments.curation.split(",")):
        sections += curation_sections(folder, read_curation(Path(folder)))
    if arguments.shards:
        sections += shard_sections(read_shards(arguments.shards))
    if arguments.run:
        sections += run_sections(arguments.run, read_ledger(Path(arguments.run)))
    output = Path(arguments.output)
    partial = output.with_name(output.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(render(output.stem, sections), encoding="utf-8")
    partial.replace(output)
    logger.info("%s: %d sections", output, len(sections))


if __name__ == "__main__":
    sys.exit(main())
