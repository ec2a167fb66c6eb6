"""Figures of a run: one record per logged step, to metrics.jsonl, TensorBoard and the console.

Keys carry their unit. `metrics.jsonl` holds what a resumed run must repeat bit for bit; wall-clock
figures go to `timing.jsonl`, so that the two can be told apart.
"""

from __future__ import annotations

import json
import logging
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from ring_train.storage.lines import PatientLines
from ring_train.train.heat_map import load_image
from ring_train.train.step import StepResult
from ring_train.train.trackers import Trackers

logger = logging.getLogger(__name__)

FILES = (
    *("metrics.jsonl", "timing.jsonl", "validation.jsonl", "evaluation.jsonl"),
    *("ledger.jsonl", "loads.jsonl", "stragglers.jsonl"),
)
"""Records of a run, each with its step."""
CHARTS = {
    "loss": {
        "training, by domain": ["Multiline", ["metrics/lm_loss/.*"]],
        "held out, by domain": ["Multiline", ["validation/valid_loss/.*"]],
    },
    "routers": {
        "busiest expert over the mean, by layer": [
            "Multiline",
            ["metrics/router_layer/max_over_mean/.*"],
        ],
    },
    "data": {"tokens read, by domain": ["Multiline", ["tokens/.*"]]},
}
"""Curves that TensorBoard shows in one chart each, under Custom Scalars."""
ANSWERS_NAME = re.compile(r"step_(\d{8,})\.jsonl")


def answers_path(run_dir: Path, step: int) -> Path:
    """Return the file of the answers given after `step` steps."""
    return run_dir / "answers" / f"step_{step:08d}.jsonl"


def answer_files(run_dir: Path) -> list[tuple[int, Path]]:
    """Return (step, file) of the answers that a run folder keeps."""
    names = ((ANSWERS_NAME.fullmatch(p.name), p) for p in run_dir.glob("answers/step_*.jsonl"))
    return [(int(match[1]), path) for match, path in names if match]


def step_metrics(
    result: StepResult, domains: Sequence[str], loads: Mapping[int, Mapping[str, float]]
) -> dict[str, float]:
    """Return the figures of one step; losses in nats per token.

    Args:
        result: what the step reported.
        domains: names of the domains, in the order of the sums.
        loads: expert-load figures per layer number, of all pipeline stages.
    """
    sums = result.sums
    record = {"lm_loss": float(sums.lm_loss)}
    for name, mean, count in zip(
        domains, sums.domain_means().tolist(), sums.domain_tokens.tolist(), strict=True
    ):
        if count:
            record[f"lm_loss/{name}"] = mean
        record[f"trained_tokens/{name}"] = count
    for depth, mean in enumerate(sums.mtp_means().tolist(), start=1):
        record[f"mtp_loss/{depth}"] = mean
    record["grad_norm"] = result.grad_norm
    record["learning_rate"] = result.learning_rate
    for key in ("max_over_mean", "entropy_nats", "dead_experts", "z_loss", "balance_loss"):
        values = [load[key] for load in loads.values() if key in load]
        if values:
            record[f"router/{key}"] = sum(values) / len(values)
    for number, load in sorted(loads.items()):
        record[f"router_layer/max_over_mean/{number}"] = load["max_over_mean"]
    return record


def load_figures(result: StepResult) -> dict[int, dict[str, float]]:
    """Return expert-load figures per layer number of this pipeline stage.

    `max_over_mean` is the busiest expert over the mean, `entropy_nats` the entropy of the load
    (ln e when balanced), `dead_experts` the experts without a token in this step; `balance_loss` is
    there where it is trained with.
    """
    figures = {}
    for number, load in result.loads.items():
        counts = load.counts.double()
        share = counts / counts.sum().clamp(min=1)
        figures[number] = {
            "max_over_mean": float(counts.max() / counts.mean().clamp(min=1e-9)),
            "entropy_nats": float(torch.special.entr(share).sum()),
            "dead_experts": float((counts == 0).sum()),
            "z_loss": float(load.z_loss),
        }
        if load.balance_loss is not None:
            figures[number]["balance_loss"] = float(load.balance_loss)
    return figures


class MetricsWriter:
    """Appends records to the run folder; on resume drops what lies past the restored step.

    Args:
        run_dir: the run folder.
        done_steps: steps completed before; records of later ones are removed.
        tensorboard: whether to write event files too.
        lines: keeps what a failing disk does not take.
        trackers: receive every figure that TensorBoard receives.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        done_steps: int,
        tensorboard: bool,
        lines: PatientLines | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        self.run_dir, self.trackers = run_dir, trackers
        self.last_loads: Mapping[int, Sequence[int]] = {}
        self.lines = lines or PatientLines()
        for name in FILES:
            self.lines.discard(run_dir / name)
            _truncate(run_dir / name, done_steps)
        for step, path in answer_files(run_dir):
            if step > done_steps:
                path.unlink()
        self.board = (
            SummaryWriter(str(run_dir / "tensorboard"), purge_step=done_steps + 1)
            if tensorboard
            else None
        )
        if self.board is not None:
            self.board.add_custom_scalars(CHARTS)

    def write(self, file: str, step: int, record: Mapping[str, float | str | None]) -> None:
        """Append {"step": step, **record} to `<file>.jsonl`, and its numbers to TensorBoard."""
        self._append(file, {"step": step, **record})
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        self._show({f"{file}/{key}": value for key, value in numbers.items()}, step)

    def write_ledger(
        self, step: int, samples: int, phase: str, ledger: dict[str, dict[str, int]]
    ) -> None:
        """Append the tokens read so far, by phase and domain, to ledger.jsonl and TensorBoard."""
        record = {"step": step, "samples": samples, "phase": phase, "tokens": ledger}
        self._append("ledger", record)
        read = {
            f"tokens/{domain}": sum(domains.get(domain, 0) for domains in ledger.values())
            for domain in ledger[phase]
        }
        self._show(read, step)

    def write_loads(self, step: int, loads: Mapping[int, Sequence[int]]) -> None:
        """Append the tokens of each expert, by layer number, to loads.jsonl."""
        self._append("loads", {"step": step, "layers": {str(n): c for n, c in loads.items()}})
        self.last_loads = loads

    def show_loads(self, step: int) -> None:
        """Show the loads that were written last in TensorBoard, as an image."""
        if self.last_loads:
            image = load_image(self.last_loads)
            name = "experts/tokens_over_mean"
            self._on_board(lambda board: board.add_image(name, image, step, dataformats="HWC"))

    def write_step_times(self, step: int, seconds: Sequence[float]) -> None:
        """Append the own seconds per step of each rank to stragglers.jsonl, null where unknown."""
        self._append(
            "stragglers",
            {"step": step, "step_s": [round(s, 6) if math.isfinite(s) else None for s in seconds]},
        )
        measured = [s for s in seconds if math.isfinite(s)]
        if len(measured) > 1:
            ratio = max(measured) / max(statistics.median_low(measured), 1e-9)
            self._show({"stragglers/slowest_over_median": ratio}, step)

    def _show(self, figures: Mapping[str, float], step: int) -> None:
        """Hand figures to TensorBoard and to trackers."""
        self._on_board(
            lambda board: [board.add_scalar(key, value, step) for key, value in figures.items()]
        )
        if self.trackers is not None:
            self.trackers.log(figures, step)

    def _on_board(self, show: Callable[[SummaryWriter], object]) -> None:
        """Show something in TensorBoard; a disk that refuses it costs the run nothing else."""
        if self.board is None:
            return
        try:
            show(self.board)
        except OSError as error:
            self.board = None
            logger.warning(
                "TensorBoard's events cannot be written (%s); they go on with the next start of "
                "the run, and every figure is in the .jsonl files",
                error,
            )

    def _append(self, file: str, record: Mapping[str, object]) -> None:
        self.lines.append(self.run_dir / f"{file}.jsonl", json.dumps(record) + "\n")

    def close(self) -> None:
        """Flush the event files."""
        self._on_board(lambda board: board.close())


def _truncate(path: Path, done_steps: int) -> None:
    """Keep the records up to `done_steps`; a torn last line is dropped."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("%s: dropping a torn record", path)
            continue
        if record["step"] <= done_steps:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
