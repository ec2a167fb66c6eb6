"""Throughput of tokenization: `python bench/data.py [tokenizer=DIR] [output=FILE] [megabytes=N]`.

One corpus of real text through our command and through what people use instead. Every row is a
command of its own, imports included; its CPU-seconds are those of all its processes. Rows that are
slow run on two slices of the corpus, and the line through them gives the whole. MEGATRON_LM=DIR
(a checkout of Megatron-LM that has tools/preprocess_data_fast.py) adds its two scripts.
"""

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from data_corpus import write_corpus

ROOT = Path(__file__).resolve().parents[1]
LARGE_TOKENIZER = ROOT.parent / "shared" / "tokenizer" / "bpe151k"
VOCAB_SIZE = 32_768
"""Of the tokenizer that is trained on the corpus where none is given."""
SLICES = (2_000_000, 24_000_000)
"""Bytes of the corpus for slow rows."""
NUM_ROUNDS = 1
"""Rows that run on the whole corpus are taken in turn so often (rounds=N); the one of less CPU
counts."""
SAMPLE_INTERVAL_S = 0.1
NOT_MEASURED = "not measured"
LIBRARIES = ("gigatoken", "tokenizers", "datasets", "datatrove", "transformers", "orjson", "numpy")


def main(words: list[str]) -> None:
    """Make the corpus, run every row and write the table."""
    given = dict(word.split("=", 1) for word in words)
    output = Path(given.get("output", ROOT / "bench/results/data.json"))
    with tempfile.TemporaryDirectory(dir=given.get("scratch")) as scratch:
        folder = Path(scratch)
        corpus = write_corpus(folder / "corpus.jsonl", int(given.get("megabytes", 320)) * 10**6)
        tokenizer = find_tokenizer(given.get("tokenizer"), folder)
        results: dict[str, Any] = {
            "machine": machine(),
            "corpus": corpus,
            "tokenizer": {"entries": count_entries(tokenizer)},
        }
        results["rounds"] = int(given.get("rounds", NUM_ROUNDS))
        measure(results, folder, tokenizer)
        results["ratios"] = ratios(results)
        results["machine"]["load_after"] = os.getloadavg()[0]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["ratios"], indent=1))


def measure(results: dict[str, Any], folder: Path, tokenizer: Path) -> None:
    """Fill in the rows."""
    whole = folder / "corpus.jsonl"
    four = repeat(whole, 4)
    rows: dict[str, Any] = {}
    results["rows"] = rows

    def add(name: str, row: dict[str, Any] | str) -> None:
        """Keep the row, or of two the one that took less CPU."""
        if not isinstance(row, str) and name in rows and rows[name]["cpu_s"] <= row["cpu_s"]:
            return
        rows[name] = row
        print(name, json.dumps(row), flush=True)

    megatron = os.environ.get("MEGATRON_LM")
    fast, slow = "preprocess_data_fast.py", "preprocess_data.py"
    for _ in range(results["rounds"]):
        add("ours, 1 process", ours(folder, whole, tokenizer, 1))
        add("ours, 2 workers", ours(folder, whole, tokenizer, 2))
        add("ours, 1 process, 4 times the corpus", ours(folder, four, tokenizer, 1))
        add("ours, 2 workers, 4 times the corpus", ours(folder, four, tokenizer, 2))
        add("gigatoken alone, text by text", alone("gigatoken", whole, tokenizer))
        add("gigatoken alone, encode_batch", alone("gigatoken_batch", whole, tokenizer))
        if megatron:
            row = run_megatron(fast, Path(megatron), whole, tokenizer)
            add(f"Megatron-LM {fast}", row)
    tokens = rows["ours, 1 process"]["tokens"]
    results["corpus"]["tokens"] = tokens
    if megatron:
        checkout = Path(megatron)
        row = extended(folder, tokens, lambda s: run_megatron(slow, checkout, s, tokenizer))
        add(f"Megatron-LM {slow}", row)
    else:
        add(f"Megatron-LM {fast}", NOT_MEASURED)
        add(f"Megatron-LM {slow}", NOT_MEASURED)
    for library in ("tokenizers", "datasets", "datatrove"):
        add(NAMES[library], extended(folder, tokens, lambda s, it=library: alone(it, s, tokenizer)))


NAMES = {
    "tokenizers": "HF tokenizers alone, encode_batch_fast",
    "datasets": "HF datasets.map, 2 processes (Arrow, not a shard)",
    "datatrove": "datatrove DocumentTokenizer, 1 task (its own format)",
}


def ours(folder: Path, corpus: Path, tokenizer: Path, workers: int) -> dict[str, Any]:
    """Return the row of our command."""
    prefix = folder / f"ours_{workers}"
    for path in folder.glob(f"{prefix.name}.*"):
        path.unlink()
    command = [
        *(sys.executable, "-m", "data_pipeline.tokenize", f"input={corpus}"),
        *(f"tokenizer={tokenizer}", f"output={prefix}", f"workers={workers}"),
    ]
    row = run(command)
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    return rated(row, manifest["tokens"]) | {
        "bin_sha256": manifest["bin_sha256"],
        "encoder": manifest["encoder"],
    }


def alone(library: str, corpus: Path, tokenizer: Path) -> dict[str, Any]:
    """Return the row of a library, run by bench/data_libraries.py."""
    script = Path(__file__).with_name("data_libraries.py")
    row = run([sys.executable, str(script), library, str(corpus), str(tokenizer)])
    told = json.loads(row.pop("stdout").splitlines()[-1])
    if "encode_cpu_s" in told:  # the encoding alone, without imports, reading and parsing
        row["cpu_s"] = told["encode_cpu_s"]
        row["wall_s"] = told["encode_cpu_s"]
    return rated(row, told["tokens"])


def run_megatron(script: str, checkout: Path, corpus: Path, tokenizer: Path) -> dict[str, Any]:
    """Return the row of one of Megatron-LM's scripts and whether its bytes are ours."""
    folder = corpus.parent
    prefix = folder / "megatron"
    options = ["--use-gigatoken"] if "fast" in script else ["--workers", "2"]
    command = [
        *(sys.executable, str(checkout / "tools" / script), "--input", str(corpus)),
        *("--output-prefix", str(prefix), "--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", str(tokenizer), "--append-eod", *options),
    ]
    row = run(command, {"PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""})
    check = folder / "check"
    for path in folder.glob("check.*"):
        path.unlink()
    run([
        *(sys.executable, "-m", "data_pipeline.tokenize", f"input={corpus}"),
        *(f"tokenizer={tokenizer}", f"output={check}"),
    ])  # fmt: skip
    same = all(
        Path(f"{prefix}_text_document.{suffix}").read_bytes()
        == Path(f"{check}.{suffix}").read_bytes()
        for suffix in ("bin", "idx")
    )
    tokens = json.loads(Path(f"{check}.json").read_text())["tokens"]
    return rated(row, tokens) | {"bytes_equal_ours": same}


def extended(folder: Path, tokens: int, measure_slice: Any) -> dict[str, Any]:
    """Return the row for the whole corpus by the line through two slices of it."""
    found = []
    for size in SLICES:
        path = folder / f"slice_{size}.jsonl"
        if not path.exists():
            write_slice(folder / "corpus.jsonl", path, size)
        found.append(measure_slice(path))
    small, large = found
    row = dict(large)
    slope = (large["cpu_s"] - small["cpu_s"]) / (large["tokens"] - small["tokens"])
    row["cpu_s"] = round(large["cpu_s"] + slope * (tokens - large["tokens"]), 2)
    row["wall_s"] = None  # another load at either slice would bend the line
    row["slices"] = [{k: f[k] for k in ("tokens", "cpu_s", "wall_s")} for f in found]
    return rated(row, tokens)


def rated(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return a row with its throughput."""
    row.pop("stdout", None)
    return row | {
        "tokens": tokens,
        "mtokens_per_cpu_s": round(tokens / row["cpu_s"] / 1e6, 3),
        "mtokens_per_wall_s": row["wall_s"] and round(tokens / row["wall_s"] / 1e6, 3),
    }


def run(command: list[str], extra: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a command and return its seconds and the most memory its processes held together."""
    environment = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        **(extra or {}),
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start_s = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=ROOT)
        peak: dict[str, float] = {"rss": 0.0, "pss": 0.0}
        sampler = threading.Thread(target=sample_memory, args=(process, peak))
        sampler.start()
        status = process.wait()
        wall_s = time.monotonic() - start_s
        sampler.join()
        out.seek(0)
        err.seek(0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed:\n{err.read()[-3000:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {
            "cpu_s": round(cpu_s, 2),
            "wall_s": round(wall_s, 2),
            "peak_rss_sum_mb": round(peak["rss"]),
            "peak_pss_sum_mb": round(peak["pss"]),
            "stdout": out.read(),
        }


def sample_memory(process: subprocess.Popen[str], peak: dict[str, float]) -> None:
    """Keep the largest sums over the process and its children; pss counts a shared page once."""
    while process.poll() is None:
        sums = {"rss": 0.0, "pss": 0.0}
        try:
            parent = psutil.Process(process.pid)
            for one in [parent, *parent.children(recursive=True)]:
                info = one.memory_full_info()
                sums["rss"] += info.rss / 1e6
                sums["pss"] += info.pss / 1e6
        except (psutil.Error, FileNotFoundError, ProcessLookupError):
            continue
        finally:
            time.sleep(SAMPLE_INTERVAL_S)
        for key, value in sums.items():
            peak[key] = max(peak[key], value)


def ratios(results: dict[str, Any]) -> dict[str, Any]:
    """Return ours over each other row in tokens per CPU-second, and how ours scales.

    The marginal figures are those from one to four times the corpus: what is left when imports and
    the loading of the tokenizer are hidden.
    """
    rows = results["rows"]
    one = rows["ours, 1 process"]
    found: dict[str, Any] = {
        f"1 process over {name}": round(one["mtokens_per_cpu_s"] / row["mtokens_per_cpu_s"], 3)
        for name, row in rows.items()
        if not name.startswith("ours") and row != NOT_MEASURED
    }
    for name in ("1 process", "2 workers"):
        once, four = rows[f"ours, {name}"], rows[f"ours, {name}, 4 times the corpus"]
        for unit in ("cpu_s", "wall_s"):
            rate = (four["tokens"] - once["tokens"]) / (four[unit] - once[unit]) / 1e6
            found[f"{name}, marginal mtokens_per_{unit}"] = round(rate, 2)
        memory = four["peak_pss_sum_mb"] / once["peak_pss_sum_mb"]
        found[f"{name}, peak pss, 4 times the corpus over once"] = round(memory, 3)
    marginal = found["1 process, marginal mtokens_per_cpu_s"]
    for name in ("text by text", "encode_batch"):
        bare = rows[f"gigatoken alone, {name}"]["mtokens_per_cpu_s"]
        found[f"1 process, marginal over gigatoken alone, {name}"] = round(marginal / bare, 3)
    two_s, one_s = (found[f"{n}, marginal mtokens_per_wall_s"] for n in ("2 workers", "1 process"))
    found["2 workers over 1 process, marginal, wall"] = round(two_s / one_s, 3)
    found["workers change no byte"] = one["bin_sha256"] == rows["ours, 2 workers"]["bin_sha256"]
    return found


def find_tokenizer(given: str | None, folder: Path) -> Path:
    """Return the folder given, the one of 151k entries beside this checkout, or a trained one."""
    if given or LARGE_TOKENIZER.is_dir():
        return Path(given) if given else LARGE_TOKENIZER
    path = folder / "tokenizer"
    with (folder / "corpus.jsonl").open() as lines, (folder / "train.jsonl").open("w") as out:
        for line in lines:
            out.write(json.dumps(json.loads(line) | {"domain": "text"}) + "\n")
    run([
        *(sys.executable, "-m", "data_pipeline.train_tokenizer", f"input={folder}/train.jsonl"),
        *(f"output={path}", f"vocab_size={VOCAB_SIZE}", "sample_bytes=30000000"),
    ])  # fmt: skip
    return path


def count_entries(tokenizer: Path) -> int:
    """Return the size of a tokenizer's vocabulary."""
    config = json.loads((tokenizer / "tokenizer.json").read_text())
    return len({*config["model"]["vocab"], *(t["content"] for t in config["added_tokens"])})


def repeat(path: Path, times: int) -> Path:
    """Write a file several times over and return the path."""
    repeated = path.with_name(f"{times}_times.jsonl")
    with repeated.open("wb") as out:
        for _ in range(times):
            with path.open("rb") as source:
                shutil.copyfileobj(source, out)
    return repeated


def write_slice(source: Path, path: Path, num_bytes: int) -> None:
    """Write lines from all over a file until they have so many bytes."""
    stride = max(1, source.stat().st_size // num_bytes)
    with source.open("rb") as lines, path.open("wb") as out:
        for number, line in enumerate(lines):
            if number % stride == 0 and out.tell() < num_bytes:
                out.write(line)


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    model = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


if __name__ == "__main__":
    main(sys.argv[1:])
