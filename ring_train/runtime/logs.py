"""Log lines and the progress bar.

The rank filter sits in the handler: code logs on every rank and never asks which rank it is.
"""

import logging
import sys

from tqdm import tqdm

PACKAGE = "ring_train"
NOISY = ("megatron.core.distributed.distributed_data_parallel",)
"""Loggers that warn at every run of what is meant: a parameter layout of DDP."""


class _RankFilter(logging.Filter):
    """Passes everything on rank 0 and only our own warnings and errors, tagged, on the others."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank_tag = f"[rank {self._rank}] " if self._rank else ""
        ours = record.name.split(".")[0] == PACKAGE
        return self._rank == 0 or (ours and record.levelno >= logging.WARNING)


class _LineHandler(logging.Handler):
    """Writes whole lines to stderr, above a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def start_logs(rank: int) -> None:
    """Send our INFO lines and the warnings of libraries to stderr; may be called again."""
    handler = _LineHandler()
    handler.addFilter(_RankFilter(rank))
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname).1s %(rank_tag)s%(message)s", "%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if not isinstance(h, _LineHandler)] + [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(PACKAGE).setLevel(logging.INFO)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def progress_bar(*, first_step: int, num_steps: int, wanted: bool | None, rank: int) -> tqdm:
    """Return a bar over steps on rank 0, and a silent one elsewhere.

    Args:
        first_step: steps that were done before.
        num_steps: steps when finished.
        wanted: show it; None shows it if stderr is a terminal, so that log files get plain lines.
        rank: global rank of this process.
    """
    shown = rank == 0 and (sys.stderr.isatty() if wanted is None else wanted)
    return tqdm(
        initial=first_step, total=num_steps, disable=not shown, unit="step", dynamic_ncols=True
    )
