"""Start-up and reading of a large mixture: `python bench/index.py [output=FILE] [documents=N]`.

Ten million documents in eight domains, a million blended samples of 4096 tokens, against the
dataset builder of megatron-core on the same files; then a plan of a billion samples. Every row of
the table is a process of its own. The .bin files are sparse: no disk is measured.
"""

import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NUM_DOMAINS = 8
SEQ_LENGTH = 4096
NUM_SAMPLES = 1_000_000
MEAN_DOCUMENT_TOKENS = 605
VOCAB_SIZE = 157_184
NUM_READ = 3000
PLAN_SAMPLES = 1_000_000_000
NUM_PREFIXES = 1_000_000


@dataclasses.dataclass(frozen=True)
class Scene:
    """Where the files of one measurement are."""

    folder: Path
    documents: int

    def prefix(self, domain: int) -> str:
        """Return the shard of a domain."""
        return str(self.folder / f"domain_{domain}")


def main(words: list[str]) -> None:
    """Write the files, run every measurement in a fresh process, and write the table."""
    given = dict(word.split("=", 1) for word in words)
    if "run" in given:
        scene = Scene(Path(given["folder"]), int(given["documents"]))
        print(json.dumps(MEASUREMENTS[given["run"]](scene)))
        return
    output = Path(given.get("output", ROOT / "bench/results/index.json"))
    with tempfile.TemporaryDirectory(dir=given.get("scratch")) as folder:
        scene = Scene(Path(folder), int(given.get("documents", 10_000_000)))
        write_shards(scene)
        results: dict[str, Any] = {"machine": machine(), "documents": scene.documents}
        for name in MEASUREMENTS:
            results[name] = run_alone(name, scene)
            print(name, json.dumps(results[name]), flush=True)
    results["ratios"] = ratios(results)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["ratios"], indent=1))


def run_alone(name: str, scene: Scene) -> dict[str, Any]:
    """Return what a measurement prints, from a process of its own."""
    words = [f"run={name}", f"folder={scene.folder}", f"documents={scene.documents}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, *words],
        check=True, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    model = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def write_shards(scene: Scene) -> None:
    """Write sparse shards of documents of geometric length, with their manifests."""
    import numpy as np

    from data_pipeline.shard_writer import INDEX_HEADER

    rng = np.random.default_rng(0)
    for domain in range(NUM_DOMAINS):
        count = scene.documents // NUM_DOMAINS
        lengths = rng.geometric(1 / MEAN_DOCUMENT_TOKENS, count).astype(np.int32)
        ends = np.cumsum(lengths, dtype=np.int64)
        with Path(f"{scene.prefix(domain)}.idx").open("wb") as stream:
            header = np.array([1], "<u8").tobytes() + b"\x04"
            header += np.array([count, count + 1], "<u8").tobytes()
            stream.write(INDEX_HEADER + header + lengths.tobytes())
            stream.write(((ends - lengths) * 4).tobytes())
            stream.write(np.arange(count + 1, dtype="<i8").tobytes())
        with Path(f"{scene.prefix(domain)}.bin").open("wb") as stream:
            stream.truncate(int(ends[-1]) * 4)
        Path(f"{scene.prefix(domain)}.tokens").write_text(str(int(ends[-1])))


def usage() -> dict[str, float]:
    """Return CPU seconds so far and anonymous memory of this process in GB."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    rollup = Path("/proc/self/smaps_rollup").read_text()
    anonymous = next(line for line in rollup.splitlines() if line.startswith("Anonymous:"))
    return {
        "cpu_s": used.ru_utime + used.ru_stime,
        "anonymous_gb": int(anonymous.split()[1]) / 1e6,
    }


def timed(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return (result, CPU and wall seconds)."""
    cpu, wall = usage()["cpu_s"], time.perf_counter()
    result = function()
    return result, {
        "cpu_s": usage()["cpu_s"] - cpu,
        "wall_s": time.perf_counter() - wall,
        "anonymous_gb": usage()["anonymous_gb"],
    }


def open_mixture(scene: Scene) -> Any:
    """Return the mixture of all domains, weighted by their tokens: no short period."""
    from ring_train.data.index import IndexFolder
    from ring_train.data.mixture import Mixture
    from ring_train.data.samples import ContiguousStream, Selection
    from ring_train.data.shards import _map_files

    index = IndexFolder(scene.folder / "index")
    streams, shares = {}, {}
    for domain in range(NUM_DOMAINS):
        name, prefix = f"domain_{domain}", scene.prefix(domain)
        tokens = int(Path(f"{prefix}.tokens").read_text())
        manifest = {
            **{"documents": scene.documents // NUM_DOMAINS, "tokens": tokens},
            **{"bin_sha256": name, "idx_sha256": ""},
        }
        shard = _map_files(prefix, manifest)
        streams[name] = ContiguousStream(name, shard, index, seed=1, selection=Selection())
        shares[name] = tokens
    mixture = Mixture([phase(NUM_SAMPLES, shares)], streams, index)
    assert max(mixture.epochs().values()) <= 1
    return mixture


def phase(num_samples: int, shares: dict[str, int]) -> Any:
    """Return a plan's only phase of so many samples."""
    from ring_train.plan import BatchPlan, Phase

    batch = BatchPlan(
        seq_length=SEQ_LENGTH, micro_batch_size=1, global_batch_size=1, num_micro_batches=1,
        tokens_per_micro_batch=SEQ_LENGTH, tokens_per_step=SEQ_LENGTH,
    )  # fmt: skip
    return Phase(
        name="train", first_step=0, num_steps=num_samples, first_sample=0, num_samples=num_samples,
        batch=batch, ramp=((0, 0, 1),), shares=shares, rotary_base=1e4, rotary_scaling_factor=1.0,
        moe_router_bias_update_rate=0.0,
    )  # fmt: skip


def ours(scene: Scene) -> dict[str, Any]:
    """Measure imports, start and reading; the first call builds the index, the second maps it."""

    def imports() -> None:
        import numba  # noqa: F401  (what builds an index needs it)

        import ring_train.data.loader  # noqa: F401

    _, imported = timed(imports)
    mixture, started = timed(lambda: open_mixture(scene))
    samples = range(NUM_SAMPLES // 2, NUM_SAMPLES // 2 + NUM_READ)
    return {
        "import": imported,
        "start": started,
        "rows": read(mixture, samples, batches=False),
        "tensors": read(mixture, samples, batches=True),
    }


def read(mixture: Any, samples: Any, *, batches: bool) -> dict[str, float]:
    """Return samples per CPU second, pages warm, as rows or as the tensors of a micro batch."""
    from ring_train.data.batch import make_batch

    def once() -> None:
        for sample in samples:
            row = mixture.row(sample)
            if batches:
                make_batch([row], document_isolation=True, num_mtp=0)

    once()
    _, used = timed(once)
    return {"samples_per_cpu_s": len(samples) / used["cpu_s"], **used}


def megatron(scene: Scene) -> dict[str, Any]:
    """Measure megatron-core's builder and dataset on the same files; cached the second time.

    Its positions and masks ignore documents here, so they are made once: less work than ours.
    """

    def imports() -> Any:
        from megatron.core.datasets import blended_megatron_dataset_builder, gpt_dataset

        import ring_train.platform  # noqa: F401

        return blended_megatron_dataset_builder, gpt_dataset

    (builder, gpt), imported = timed(imports)
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    weights = [float(Path(f"{scene.prefix(d)}.tokens").read_text()) for d in range(NUM_DOMAINS)]
    config = gpt.GPTDatasetConfig(
        random_seed=1, sequence_length=SEQ_LENGTH,
        blend=([scene.prefix(d) for d in range(NUM_DOMAINS)], weights), split="1",
        path_to_cache=str(scene.folder / "megatron_cache"), tokenizer=Tokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False, mid_level_dataset_surplus=0.005,
    )  # fmt: skip
    build = builder.BlendedMegatronDatasetBuilder(
        gpt.GPTDataset, [NUM_SAMPLES, 0, 0], lambda: True, config
    ).build
    datasets, started = timed(build)
    import torch

    def once() -> None:
        for sample in range(NUM_SAMPLES // 2, NUM_SAMPLES // 2 + NUM_READ):
            example = datasets[0][sample]
            assert isinstance(example["tokens"], torch.Tensor)

    once()
    _, used = timed(once)
    figures = {"samples_per_cpu_s": NUM_READ / used["cpu_s"], **used}
    return {"import": imported, "start": started, "tensors": figures}


class Tokenizer:
    """What GPTDataset asks of a tokenizer."""

    eod = 0
    pad = 0
    vocab_size = VOCAB_SIZE
    unique_identifiers: dict[str, str] = {"class": "bench"}  # noqa: RUF012


def raw_slices(scene: Scene) -> dict[str, float]:
    """Measure slices of 4097 tokens of the mapped files, as int64 tensors."""
    import numpy as np
    import torch

    maps = [np.memmap(f"{scene.prefix(d)}.bin", mode="r", dtype="<i4") for d in range(NUM_DOMAINS)]
    rng = np.random.default_rng(0)
    domains = rng.integers(0, NUM_DOMAINS, NUM_READ).tolist()
    firsts = [int(rng.integers(0, len(maps[d]) - SEQ_LENGTH - 1)) for d in domains]

    def once() -> None:
        for domain, first in zip(domains, firsts, strict=True):
            torch.from_numpy(maps[domain][first : first + SEQ_LENGTH + 1].astype(np.int64))

    once()
    _, used = timed(once)
    return {"samples_per_cpu_s": NUM_READ / used["cpu_s"], **used}


def billion(scene: Scene) -> dict[str, Any]:
    """Plan a billion samples of coprime budgets; audit its end and many random prefixes."""
    import numpy as np

    from ring_train.data.blend import BlendSchedule

    rng = np.random.default_rng(1)
    shares = rng.integers(1, 10**9, NUM_DOMAINS)
    shares = (shares * (PLAN_SAMPLES / shares.sum())).astype(np.int64)
    shares[0] += PLAN_SAMPLES - shares.sum()
    schedule, planned = timed(lambda: BlendSchedule(shares.tolist(), PLAN_SAMPLES))
    assert schedule.period == PLAN_SAMPLES, "the budgets have a common divisor"
    assert schedule.counts(PLAN_SAMPLES).tolist() == shares.tolist()
    states = schedule._states
    starts = np.arange(len(states), dtype=np.int64) * 4096
    assert (states.sum(1) == starts).all()

    def audit() -> float:
        """Return the largest deviation of any domain at random prefixes, block by block."""
        worst, remaining = 0, NUM_PREFIXES
        blocks = rng.permutation(len(states))
        while remaining > 0:
            block = int(blocks[remaining % len(blocks)])
            domains, _ = schedule._block(block)
            counts = states[block] + np.cumsum(np.eye(NUM_DOMAINS, dtype=np.int64)[domains], axis=0)
            offsets = rng.integers(0, len(domains), min(remaining, 4096))
            prefixes = block * 4096 + offsets + 1
            # exact: count * total - prefix * share stays below 2^63
            errors = counts[offsets] * PLAN_SAMPLES - prefixes[:, None] * shares
            worst = max(worst, int(np.abs(errors).max()))
            remaining -= len(offsets)
        return worst / PLAN_SAMPLES

    worst, audited = timed(audit)
    assert worst <= 1 - 1 / (2 * NUM_DOMAINS - 2)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {
        "samples": PLAN_SAMPLES,
        "plan": planned,
        "audit": audited,
        "prefixes": NUM_PREFIXES,
        "largest_deviation": worst,
        "peak_gb": peak_gb,
    }


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Return the figures that goals are set for."""
    ours_rate = results["ours_warm"]["tensors"]["samples_per_cpu_s"]
    rows_rate = results["ours_warm"]["rows"]["samples_per_cpu_s"]
    theirs = results["megatron_warm"]["tensors"]["samples_per_cpu_s"]
    return {
        "cold_start_cpu_of_megatron": (
            results["ours_cold"]["start"]["cpu_s"] / results["megatron_cold"]["start"]["cpu_s"]
        ),
        "warm_start_wall_s": results["ours_warm"]["start"]["wall_s"],
        "anonymous_gb_after_cold_start": results["ours_cold"]["start"]["anonymous_gb"],
        "tensors_per_cpu_s_over_megatron": ours_rate / theirs,
        "rows_per_cpu_s_over_megatron": rows_rate / theirs,
        "rows_per_cpu_s_over_raw_slices": (rows_rate / results["raw_slices"]["samples_per_cpu_s"]),
        "billion_samples_plan_s": results["billion"]["plan"]["wall_s"],
        "billion_samples_peak_gb": results["billion"]["peak_gb"],
    }


MEASUREMENTS: dict[str, Callable[[Scene], dict[str, Any]]] = {
    "megatron_cold": megatron,
    "megatron_warm": megatron,
    "ours_cold": ours,
    "ours_warm": ours,
    "raw_slices": raw_slices,
    "billion": billion,
}

if __name__ == "__main__":
    main(sys.argv[1:])
