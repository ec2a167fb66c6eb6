"""A run that lasts for hours under random faults: `python -m tests.chaos.soak minutes=120`.

The tiny model trains on four ranks while ranks are killed, stopped, preempted and hung at random
moments, gradients turn into NaN and disks refuse files. At the end one report tells goodput,
faults, memory and file handles of every rank, and whether the first steps are, byte for byte, those
of a run that nobody disturbed.

| word | |
|---|---|
| minutes | how long |
| ranks | 4 |
| folder | receives the run, its corpus and report.json |
| seed | of the faults |
| mean_s | mean time between faults that come from outside |
| compare_steps | first steps to repeat without faults |
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

SAMPLE_S = 10.0
OUTSIDE = {"kill": 4, "preempt": 4, "freeze": 1}
"""Faults from outside and how often each: SIGKILL of a rank, SIGTERM of all, SIGSTOP of a rank."""
INSIDE = ("nan", "nan times=2", "spike", "disk_full times=2", "io_error", "slow_disk after_s=3")
HANG_TIMEOUT_S = 30.0
REACH_STEPS = 400


class Soak:
    """One soak.

    Args:
        folder: receives everything.
        ranks: of the run.
        seed: of the faults.
        mean_s: between faults from outside.
    """

    def __init__(self, folder: Path, ranks: int, seed: int, mean_s: float) -> None:
        self.folder, self.ranks, self.mean_s = folder, ranks, mean_s
        self.run_dir = folder / "run"
        self.random = random.Random(seed)
        self.pids: list[int] = []
        self.attempt = 0
        self.over = threading.Event()
        self.began = time.monotonic()

    def words(self, run_dir: Path) -> list[str]:
        """Return the words of the run."""
        corpus = self.folder / "corpus"
        words = [
            *("model=tiny", "optim=constant", "train=cpu", f"data.tokenizer={corpus}/tokenizer"),
            *("train.num_steps=1000000", "train.seq_length=64", "train.micro_batch_size=1"),
            *("train.global_batch_size=8", "train.eval_interval_steps=500", "train.eval_steps=2"),
            *("optim.lr=1e-3", "optim.lr_warmup_steps=20", "logging.progress=false"),
            *("logging.interval_steps=10", "checkpoint.interval_steps=50"),
            *("parallel=ep2", "parallel.use_distributed_optimizer=true", f"run_dir={run_dir}"),
            *("resilience=unattended", f"resilience.hang_timeout_s={HANG_TIMEOUT_S}"),
            *("resilience.hang_grace_s=2", "resilience.max_roll_backs=1000"),
        ]
        for domain in ("code", "math"):
            words.append(f"data.domains.{domain}.path={corpus}/{domain}")
            words.append(f"data.domains.{domain}.valid_path={corpus}/{domain}_valid")
        return words

    def start(self, attempt: int) -> Any:
        """Return how the run is started the nth time: every tenth is cold."""
        from tests.chaos.supervisor import Start

        self.attempt = attempt
        kind = self.random.choice(INSIDE)
        first = self.newest() + 1
        step = first + self.random.randrange(REACH_STEPS)
        rank = self.random.randrange(self.ranks)
        fault = f"kind={kind} step={step} rank={rank} attempt=0"
        return Start(
            words=[*self.words(self.run_dir), f"resilience.faults=['{fault}']"],
            num_ranks=self.ranks,
            log=self.folder / "ranks.log",
            cold=attempt % 10 == 0,
            on_start=self.take,
        )

    def take(self, pids: list[int]) -> None:
        """Note the ranks that live now."""
        self.pids = pids

    def newest(self) -> int:
        """Return the step of the newest checkpoint."""
        names = (path.name for path in self.run_dir.glob("checkpoints/step_????????"))
        return max((int(name[5:]) for name in names), default=0)

    def disturb(self) -> None:
        """Do something to the ranks now and then."""
        while not self.over.wait(self.random.expovariate(1 / self.mean_s)):
            kind = self.random.choices(list(OUTSIDE), list(OUTSIDE.values()))[0]
            victim = self.random.randrange(self.ranks)
            targets = range(self.ranks) if kind == "preempt" else [victim]
            number = {"kill": signal.SIGKILL, "preempt": signal.SIGTERM, "freeze": signal.SIGSTOP}
            for rank in targets:
                try:
                    os.kill(self.pids[rank], number[kind])
                except (ProcessLookupError, IndexError):
                    continue
            self.note("faults", kind=kind)

    def watch(self) -> None:
        """Sample memory and file handles of the ranks."""
        while not self.over.wait(SAMPLE_S):
            for rank, pid in enumerate(list(self.pids)):
                try:
                    process = psutil.Process(pid)
                    memory, handles = process.memory_info(), process.num_fds()
                except (psutil.Error, OSError):
                    continue
                self.note(
                    "samples",
                    rank=rank,
                    private_bytes=memory.rss - memory.shared,
                    handles=handles,
                )

    def note(self, name: str, **fields: object) -> None:
        """Append to NAME.jsonl when and in which start of the run something was."""
        record = {"after_s": self.elapsed(), "attempt": self.attempt, **fields}
        with (self.folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def elapsed(self) -> float:
        """Return the seconds since the soak began."""
        return round(time.monotonic() - self.began, 1)

    def run(self, minutes: float) -> None:
        """Train under faults for some minutes, and stop by a signal."""
        from tests.chaos.supervisor import run_once

        threads = [threading.Thread(target=f, daemon=True) for f in (self.disturb, self.watch)]
        for thread in threads:
            thread.start()
        timer = threading.Timer(60 * minutes, self.stop)
        timer.daemon = True
        timer.start()
        attempt = 0
        while not self.over.is_set():
            attempt += 1
            self.note("starts", statuses=run_once(self.start(attempt), longest_s=3600.0))

    def stop(self) -> None:
        """End the soak: all ranks are told to."""
        self.over.set()
        for pid in self.pids:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue

    def compare(self, steps: int) -> str:
        """Repeat the first steps without faults; return how the records compare."""
        from ring_train.resilience.journal import read_journal, skipped_steps
        from tests.chaos.supervisor import Start, run_once

        skipped = sorted(skipped_steps(read_journal(self.run_dir)))
        quiet = self.folder / "quiet"
        words = [
            *self.words(quiet),
            f"train.stop_after_step={steps}",
            f"resilience.skip_steps={skipped}".replace(" ", ""),
        ]
        run_once(Start(words, self.ranks, self.folder / "quiet.log"), longest_s=3600.0)
        ours, theirs = (
            (folder / "metrics.jsonl").read_text().splitlines()[: steps // 10]
            for folder in (self.run_dir, quiet)
        )
        same = sum(a == b for a, b in zip(ours, theirs, strict=False))
        return f"{same} of {len(theirs)} records of the first {steps} steps are byte-equal"


def main(words: list[str]) -> None:
    """Run a soak."""
    given = dict(word.split("=", 1) for word in words)
    folder = Path(given.get("folder", "runs/soak"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    soak = Soak(
        folder,
        ranks=int(given.get("ranks", "4")),
        seed=int(given.get("seed", "1")),
        mean_s=float(given.get("mean_s", "150")),
    )
    _warm(folder)
    soak.began = time.monotonic()
    soak.run(float(given.get("minutes", "120")))
    elapsed = soak.elapsed()
    compared = soak.compare(int(given.get("compare_steps", "300")))
    (folder / "report.json").write_text(json.dumps({"elapsed_s": elapsed, "compared": compared}))
    sys.stdout.write(f"{compared}; report in {folder}\n")


def _warm(folder: Path) -> None:
    """Make the corpus, and import what ranks need once."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo
    import transformers  # noqa: F401

    import ring_train.runtime.distributed
    import ring_train.train.loop  # noqa: F401
    from tests.e2e.conftest import make_corpus

    torch.set_num_threads(1)
    make_corpus(folder / "corpus")


if __name__ == "__main__":
    main(sys.argv[1:])
