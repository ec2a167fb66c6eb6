"""Throughput of generation: `python bench/generation.py [output=FILE] [rounds=N]`.

Tokens per CPU-second of one process with one thread: the `small` model with random weights in fp32,
prompts of 32 tokens, answers of 128 sampled at temperature 1, at several batch sizes; ours, and
transformers' `generate` on the modeling files that an export carries. Every row is a process of its
own; imports, building and a first short call are not counted. The best of N rounds counts.
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
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZES = (1, 16, 64, 256)
PROMPT_TOKENS, NEW_TOKENS = 32, 128
WARM_TOKENS = 3
MODEL = "small"


def main(words: list[str]) -> None:
    """Run every row and write the table, or run the one row that the words name."""
    given = dict(word.split("=", 1) for word in words)
    if "run" in given:
        row = {"ours": ours, "transformers": theirs}[given["run"]]
        print(json.dumps(row(int(given["batch"]))))
        return
    results: dict[str, Any] = {
        "machine": machine(),
        "model": MODEL,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
    for name in ("ours", "transformers"):
        results[name] = {
            batch: min(
                (run_alone(name, batch) for _ in range(int(given.get("rounds", 2)))),
                key=lambda row: row["cpu_s"],
            )
            for batch in BATCH_SIZES
        }
        rates = {batch: row["tokens_per_cpu_s"] for batch, row in results[name].items()}
        print(name, json.dumps(rates))
    results["machine"]["load_after"] = os.getloadavg()[0]
    output = Path(given.get("output", ROOT / "bench/results/generation.json"))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")


def run_alone(name: str, batch: int) -> dict[str, float]:
    """Return what a row prints, from a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, f"run={name}", f"batch={batch}"],
        check=True, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "cpu": cpus[0].split(":")[1].strip() if cpus else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def cpu_s() -> float:
    """Return the CPU seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def timed(batch: int, generate: Any) -> dict[str, float]:
    """Return the row of a call `generate(number of tokens) -> tokens written`."""
    generate(WARM_TOKENS)
    cpu, wall = cpu_s(), time.perf_counter()
    count = generate(NEW_TOKENS)
    row = {"cpu_s": cpu_s() - cpu, "wall_s": time.perf_counter() - wall}
    assert count == batch * NEW_TOKENS
    return {**row, "tokens_per_cpu_s": round(count / row["cpu_s"], 1)}


def ours(batch: int) -> dict[str, float]:
    """Measure `ring_train.generation`."""
    import ring_train.platform  # noqa: F401  (before megatron-core)

    # isort: split
    import numpy as np

    from ring_train.config import compose
    from ring_train.generation import Generator, Sampling
    from ring_train.model.build import build_model
    from ring_train.plan import make_plan
    from ring_train.runtime.distributed import start_runtime

    plan = make_plan(compose("pretrain", [f"model={MODEL}", "train.precision=fp32"]), 1)
    prompts = np.random.default_rng(0).integers(0, 2000, (batch, PROMPT_TOKENS)).tolist()
    with start_runtime(plan) as groups:
        generator = Generator(
            plan,
            build_model(plan, groups.collection),
            groups,
            max_batch_size=batch,
            max_prefill_tokens=batch * PROMPT_TOKENS,
        )

        def generate(num_tokens: int) -> int:
            answers = generator.generate(
                prompts, Sampling(max_new_tokens=num_tokens, stop_tokens=())
            )
            return sum(len(answer.tokens) for answer in answers)

        return timed(batch, generate)


def theirs(batch: int) -> dict[str, float]:
    """Measure transformers on the modeling files of an export of the same model."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1"}
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from ring_train.config import WeightFormat, compose
        from ring_train.hf.config import hf_config_dict
        from ring_train.hf.family import FAMILIES

        torch.manual_seed(0)
        config = compose("pretrain", [f"model={MODEL}"]).model
        folder = Path(scratch) / "model"
        folder.mkdir()
        for path in FAMILIES[config.architecture].modeling_files:
            shutil.copy(path, folder)
        text = json.dumps(hf_config_dict(config, weights=WeightFormat.fp32))
        (folder / "config.json").write_text(text)
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=True).float().eval()
        prompts = torch.randint(0, 2000, (batch, PROMPT_TOKENS))

        def generate(num_tokens: int) -> int:
            out = model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=True,
                top_k=0,
            )
            return out[:, PROMPT_TOKENS:].numel()

        return timed(batch, generate)


if __name__ == "__main__":
    main(sys.argv[1:])
