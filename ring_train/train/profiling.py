"""Traces and memory snapshots of chosen steps, without any effect on what is computed.

Two ways to ask: `profile=true`, with `logging.profile_steps` or else the third and fourth step of
this start; or, for a run under way, a file RUN_DIR/profile.request, which rank 0 takes at the next
logged step and answers with the two steps after it.

RUN_DIR/profile/ receives, for each rank of `logging.profile_ranks`, `steps_A_to_B_rank_R.json.gz`
(chrome://tracing, Perfetto), and beside it on CUDA `..._memory.pickle` (a snapshot of the
allocator; see torch's memory_viz), on the CPU `..._memory.txt` (operators by the memory they take).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ring_train.plan import Plan
from ring_train.runtime.distributed import Groups

logger = logging.getLogger(__name__)

FOLDER = "profile"
REQUEST_FILE = "profile.request"
FIRST_AFTER_START, NUM_STEPS = 3, 2
"""The first steps of a start allocate and compile; they tell little."""
MAX_MEMORY_EVENTS = 100_000
TABLE_ROWS = 40


class StepProfiler:
    """Profiles this rank for the steps it is told to; `before` and `after` go around every step.

    Args:
        plan: says which steps and ranks, and where to.
        groups: process groups and ranks.
        done_steps: steps before this start.
    """

    def __init__(self, plan: Plan, groups: Groups, done_steps: int) -> None:
        logs = plan.config.logging
        self.run_dir, self.groups = Path(plan.config.run_dir), groups
        self.is_asked = groups.rank in logs.profile_ranks
        self.steps: tuple[int, int] | None = None
        """Numbers of the first and the last step to profile."""
        if plan.config.profile:
            first = done_steps + FIRST_AFTER_START
            first, last = logs.profile_steps or (first, first + NUM_STEPS - 1)
            self.steps = first, last
        self._running: profile | None = None
        self._begun = self._done = 0

    def before(self, step: int) -> None:
        """Begin a profile if the step, numbered as in metrics.jsonl, is the first of one."""
        if self.steps is None or self._running is not None or not self.is_asked:
            return
        first, last = self.steps
        if first <= step <= last:
            self._begin(step)

    def after(self, step: int) -> None:
        """End the profile after its last step."""
        self._done = step
        if self.steps is not None and step >= self.steps[1]:
            self.end()
            self.steps = None

    def end(self) -> None:
        """End a profile that is under way, with what it has."""
        if self._running is not None:
            running, self._running = self._running, None
            self._write(running, self._done)

    def take_request(self, step: int) -> None:
        """Profile the steps after this one if somebody has asked for it. Collective."""
        request = self.run_dir / REQUEST_FILE
        wanted = self.groups.rank == 0 and self.steps is None and request.exists()
        if self.groups.agreement.any(wanted):
            self.steps = step + 1, step + NUM_STEPS
            if self.groups.rank == 0:
                request.unlink(missing_ok=True)
                logger.info("%s: profiling steps %d to %d", REQUEST_FILE, *self.steps)

    def _begin(self, step: int) -> None:
        self._begun = step
        is_cuda = self.groups.device.type == "cuda"
        if is_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
        # Kineto complains on standard error that there is no GPU.
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
        self._running = profile(
            activities=activities, record_shapes=True, profile_memory=not is_cuda, acc_events=True
        )
        self._running.start()

    def _write(self, running: profile, step: int) -> None:
        """Write what was recorded; a disk that refuses costs the profile, not the run."""
        is_cuda = self.groups.device.type == "cuda"
        if is_cuda:
            torch.cuda.synchronize(self.groups.device)
        running.stop()
        folder = self.run_dir / FOLDER
        name = f"steps_{self._begun}_to_{step}_rank_{self.groups.rank}"
        try:
            folder.mkdir(exist_ok=True)
            running.export_chrome_trace(str(folder / f"{name}.json.gz"))
            if is_cuda:
                torch.cuda.memory._dump_snapshot(str(folder / f"{name}_memory.pickle"))
            else:
                averages = running.key_averages()
                table = averages.table(sort_by="self_cpu_memory_usage", row_limit=TABLE_ROWS)
                (folder / f"{name}_memory.txt").write_text(table)
        except (OSError, RuntimeError) as error:
            logger.warning("%s: the profile could not be written (%s)", folder / name, error)
            return
        finally:
            if is_cuda:
                torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("wrote %s", folder / f"{name}.json.gz")
