"""Memory and speed of export: `python bench/export.py [output=FILE] [scratch=DIR] [formats=bf16]`.

Makes checkpoints of two sizes with random bf16 weights - the layers of Ring-mini-linear-2.0 with 64
experts, five and ten of them - and exports each in a process of its own. A raw write of as many
bytes in the same run says what the disk does. Needs 20 GB there.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "tests" / "golden" / "ling_v2"
NUM_LAYERS = (5, 10)
FORMATS = ("bf16", "fp32", "fp8")
NUM_RUNS = 3
PART_BYTES = 2**30
MODEL = ["model=ring_mini_linear_2_0", "model.num_moe_experts=64", "model.mtp_num_layers=0"]


def main(words: list[str]) -> None:
    """Make the checkpoints, measure each export alone, and write the table."""
    given = dict(word.split("=", 1) for word in words)
    if "run" in given:
        print(json.dumps(export_here(given)))
        return
    if "make" in given:
        print(json.dumps(make_checkpoint(Path(given["make"]), int(given["layers"]))))
        return
    formats = given.get("formats", ",".join(FORMATS)).split(",")
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    with tempfile.TemporaryDirectory(dir=given.get("scratch")) as folder:
        for layers in NUM_LAYERS:
            checkpoint = Path(folder) / f"layers_{layers}"
            results[f"layers_{layers}"] = {
                **alone([f"make={checkpoint}", f"layers={layers}"]),
                **{form: measure(checkpoint, form) for form in formats},
            }
            print(json.dumps(results[f"layers_{layers}"]), flush=True)
            subprocess.run(["rm", "-r", str(checkpoint)], check=True)
    output = Path(given.get("output", ROOT / "bench/results/export.json"))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")


def alone(words: list[str]) -> dict[str, Any]:
    """Return what this script prints in a process of its own."""
    command = [sys.executable, __file__, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(out.stdout.splitlines()[-1])


def measure(checkpoint: Path, form: str) -> dict[str, Any]:
    """Return medians over exports that alternate with raw writes."""
    runs = []
    for _ in range(NUM_RUNS):
        run = alone(["run=export", f"checkpoint={checkpoint}", f"form={form}"])
        runs.append({**run, "raw_write_s": raw_write(checkpoint.parent / "raw", run["bytes"])})
    seconds = {
        key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "bytes"
    }
    ratio = statistics.median(run["raw_write_s"] / run["write_s"] for run in runs)
    return {"bytes": runs[0]["bytes"], **seconds, "write_over_raw": ratio}


def raw_write(path: Path, num_bytes: int) -> float:
    """Return the seconds of writing so many bytes to the disk and nothing else."""
    chunk = memoryview(os.urandom(16 * 2**20))
    begin = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for position in range(0, num_bytes, len(chunk)):
            file.write(chunk[: num_bytes - position])
        os.fsync(file.fileno())
    elapsed = time.perf_counter() - begin
    path.unlink()
    return elapsed


def export_here(given: dict[str, str]) -> dict[str, Any]:
    """Export and return bytes written, seconds by part, and the peak memory of this process."""
    import torch

    from ring_train.checkpoint.reading import check_hashes
    from ring_train.checkpoint.weights import open_weights
    from ring_train.config import WeightFormat, read_yaml
    from ring_train.hf.writer import HfFormat, write_hf_folder

    torch.set_num_threads(1)
    checkpoint = Path(given["checkpoint"])
    config = read_yaml(checkpoint / "config.yaml")
    imports_bytes = peak_bytes()
    begin = time.perf_counter()
    weights = open_weights(checkpoint, check=check_hashes)
    hashed = time.perf_counter()
    output = checkpoint.parent / "export"
    form = HfFormat(weights=WeightFormat(given["form"]))
    write_hf_folder(output, config.model, weights.read, form=form, tokenizer_dir=TOKENIZER)
    end = time.perf_counter()
    num_bytes = sum(path.stat().st_size for path in output.iterdir())
    subprocess.run(["rm", "-r", str(output)], check=True)
    return {
        "bytes": num_bytes,
        "hash_s": hashed - begin,
        "write_s": end - hashed,
        "peak_bytes": peak_bytes(),
        "imports_bytes": imports_bytes,
    }


def peak_bytes() -> int:
    """Return the largest resident set that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_checkpoint(folder: Path, num_layers: int) -> dict[str, Any]:
    """Write a checkpoint of random bf16 weights; return how many and the largest of them."""
    import torch

    from ring_train.checkpoint.assembly import assemble, part_name, write_record
    from ring_train.checkpoint.boxes import Box
    from ring_train.checkpoint.manifest import Piece, StoredTensor
    from ring_train.config import compose, to_yaml
    from ring_train.hf.table import make_table
    from ring_train.storage.files import write_durably
    from ring_train.storage.safetensors import Described, safetensors_chunks

    words = [*MODEL, f"model.num_layers={num_layers}", "train.precision=bf16"]
    config = compose("pretrain", [*words, f"data.tokenizer={TOKENIZER}"])
    generator = torch.Generator().manual_seed(0)
    parts: list[list[Described]] = [[]]
    entries = make_table(config.model).values()
    for entry in entries:
        dtype = torch.float32 if entry.fp32 else torch.bfloat16
        item = Described(name=f"weight/{entry.logical}#0", dtype=dtype, shape=entry.shape)
        if parts[-1] and sum(i.num_bytes for i in parts[-1]) + item.num_bytes > PART_BYTES:
            parts.append([])
        parts[-1].append(item)
    folder.mkdir(parents=True)
    for number, part in enumerate(parts):
        shapes = {item.name: item for item in part}

        def draw(name: str, shapes: dict[str, Described] = shapes) -> torch.Tensor:
            item = shapes[name]
            return torch.empty(item.shape, dtype=item.dtype).normal_(0, 0.02, generator=generator)

        record = write_durably(folder / part_name(number), safetensors_chunks(part, draw, {}))
        tensors = {}
        for item in part:
            dtype = "F32" if item.dtype == torch.float32 else "BF16"
            whole = Box(tuple(0 for _ in item.shape), item.shape)
            piece = Piece(part_name(number), item.name, whole)
            tensors[item.name.removesuffix("#0")] = StoredTensor(dtype, item.shape, (piece,))
        write_record(folder, number, {part_name(number): record}, tensors)
    texts = {"config.yaml": to_yaml(config), "train_state.json": json.dumps({"step": 1})}
    assemble(folder, len(parts), texts, step=1, saved_by={})
    sizes = [item.num_bytes for part in parts for item in part]
    return {"checkpoint_bytes": sum(sizes), "largest_tensor_bytes": max(sizes)}


if __name__ == "__main__":
    main(sys.argv[1:])
