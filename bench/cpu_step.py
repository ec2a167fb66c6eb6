"""A CPU training step against other code: `python bench/cpu_step.py [rounds=N] [KEY=VALUE ..]`.

One thread, fp32, 4 rows of 512 tokens; 8 layers of 256 channels, 4 heads, 8192 words; the first
layer dense, then 16 experts of 128 channels, two a token. Contestants, each a process of its own:

    ours    this project: the real plan, model, optimizer and `train_step`, every fourth layer
            softmax attention, shared expert, gate; all logits at once (kernels.cross_entropy=full)
    plain   a hybrid of the same layers in plain torch (bench/cpu_step_plain.py)
    hf      transformers' Qwen3MoeForCausalLM: softmax attention throughout, no shared expert

They step in turn; medians of their CPU time are compared as ratios, which survive a busy machine.
Other words are overrides of the run of ours, e.g. `kernels=reference`. Writes JSON to
`output=FILE` and a plot beside it; fails if ours reaches less than 0.80 of the speed of plain.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROWS, TOKENS, VOCABULARY, HIDDEN = 4, 512, 8192, 256
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0
ROUNDS = 9
LEAST, AIM = 0.80, 0.95
"""Speed of ours over that of plain: what must be, and what should."""
RUN = [
    *("model=small", f"model.hidden_size={HIDDEN}", "model.ffn_hidden_size=768"),
    *(f"model.vocab_size={VOCABULARY}", "model.num_attention_heads=4", "model.num_query_groups=2"),
    *("model.kv_channels=64", "model.moe_ffn_hidden_size=128"),
    *("model.moe_shared_expert_intermediate_size=128", "model.mtp_num_layers=0"),
    *("optim=short", "train=cpu", f"train.seq_length={TOKENS}", f"train.micro_batch_size={ROWS}"),
    *(f"train.global_batch_size={ROWS}", "train.eval_interval_steps=0", "train.num_steps=100"),
    *("checkpoint.async_save=false", "kernels.cross_entropy=full"),
]


def main(words: list[str]) -> None:
    """Let all contestants step in turn and write the table, or be the one that the words name."""
    given = dict(word.split("=", 1) for word in words)
    sys.path.insert(0, str(ROOT))
    if "run" in given:
        overrides = [w for w in words if not w.startswith("run=")]
        with CONTESTANTS[given["run"]](overrides) as (step, size):
            serve(step, size)
        return
    rounds = int(given.get("rounds", ROUNDS))
    output = Path(given.get("output", ROOT / "bench/results/cpu_step.json"))
    overrides = [w for w in words if w.split("=", 1)[0] not in ("rounds", "output")]
    results = compare(rounds, overrides)
    output.write_text(json.dumps(results, indent=1) + "\n")
    plot(results["contestants"], output.with_suffix(".png"))
    ratio = results["ours_over_plain"]
    print(f"ours over plain {ratio:.2f} (at least {LEAST}, aim {AIM}), "
          f"over transformers {results['ours_over_hf']:.2f}")  # fmt: skip
    if ratio < LEAST:
        raise SystemExit(f"missed: {ratio:.2f} of the speed of plain torch, at least {LEAST}")


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw speed and peak memory of each contestant."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(ncols=2, figsize=(8, 3))
    labels = {"tokens_per_cpu_s": "tokens a CPU second", "peak_mib": "peak MiB"}
    for one, (key, label) in zip(axes, labels.items(), strict=True):
        one.bar([*rows], [row[key] for row in rows.values()])
        one.set_ylabel(label)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def compare(rounds: int, overrides: list[str]) -> dict[str, Any]:
    """Return sizes, CPU seconds and ratios of all contestants."""
    described = machine()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, f"run={name}", *(overrides if name == "ours" else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for name in CONTESTANTS
    }
    sizes = {name: json.loads(answer(process)) for name, process in processes.items()}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    for number in range(rounds + 2):
        for name, process in processes.items():
            assert process.stdin is not None
            process.stdin.write("step\n")
            process.stdin.flush()
            step = json.loads(answer(process))
            if number > 1:  # the first steps allocate
                steps[name].append(step)
    for process in processes.values():
        process.communicate()
    print(f"{'':7}{'parameters':>12}{'CPU s':>8}{'of it sys':>10}{'tokens/CPU s':>14}"
          f"{'peak MiB':>10}{'loss':>8}")  # fmt: skip
    rows = {}
    for name, taken in steps.items():
        median = {key: statistics.median(step[key] for step in taken) for key in taken[0]}
        rows[name] = {**sizes[name], **median, "steps": len(taken)}
        rows[name]["tokens_per_cpu_s"] = ROWS * TOKENS / median["cpu_s"]
        print(f"{name:7}{sizes[name]['parameters']:12}{median['cpu_s']:8.3f}{median['system_s']:10.3f}"
              f"{rows[name]['tokens_per_cpu_s']:14.0f}{median['peak_mib']:10.0f}"
              f"{taken[-1]['loss']:8.3f}")  # fmt: skip
    described["load_after"] = os.getloadavg()[0]
    return {
        "machine": described,
        "overrides": overrides,
        "contestants": rows,
        "ours_over_plain": rows["plain"]["cpu_s"] / rows["ours"]["cpu_s"],
        "ours_over_hf": rows["hf"]["cpu_s"] / rows["ours"]["cpu_s"],
    }


def answer(process: subprocess.Popen[str]) -> str:
    """Return the next line of JSON of a contestant."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return line
    raise SystemExit(f"a contestant failed: {process.args}")


def serve(step: Callable[[], float], parameters: int) -> None:
    """Make a step for each line of the input, and answer its figures."""
    print(json.dumps({"parameters": parameters}), flush=True)
    for _ in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_SELF)
        began = time.process_time()
        loss = step()
        cpu_s = time.process_time() - began
        after = resource.getrusage(resource.RUSAGE_SELF)
        figures = {
            "cpu_s": cpu_s,
            "system_s": after.ru_stime - before.ru_stime,
            "peak_mib": after.ru_maxrss / 1024,
            "loss": loss,
        }
        print(json.dumps(figures), flush=True)


@contextmanager
def ours(overrides: list[str]) -> Iterator[tuple[Callable[[], float], int]]:
    """Build our training of one rank; give its step and its number of parameters."""
    import torch
    import torch.distributed as dist

    import ring_train.runtime.distributed
    from ring_train.config import compose
    from ring_train.data.batch import pack_documents
    from ring_train.model.build import build_model
    from ring_train.plan import make_plan
    from ring_train.train.optimizer import build_optimizer
    from ring_train.train.step import train_step

    torch.set_num_threads(1)
    plan = make_plan(compose("pretrain", [*RUN, *overrides]), 1)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        with ring_train.runtime.distributed.start_runtime(plan) as groups:
            model = build_model(plan, groups.collection)
            optimizer = build_optimizer(plan, model, groups.collection)
            rows = [pack_documents(tokens()[:, :-1].tolist(), num_mtp=0)]

            def step() -> float:
                result = train_step(
                    *(plan, model, optimizer, rows, groups.collection), step=20, num_domains=1
                )
                return float(result.sums.lm_loss)

            yield step, sum(p.numel() for chunk in model for p in chunk.parameters())


@contextmanager
def plain(overrides: list[str]) -> Iterator[tuple[Callable[[], float], int]]:
    """Build the hybrid of plain torch."""
    import torch

    from bench.cpu_step_plain import Hybrid

    yield other_step(Hybrid(VOCABULARY, HIDDEN), torch.nn.functional.cross_entropy)


@contextmanager
def hf(overrides: list[str]) -> Iterator[tuple[Callable[[], float], int]]:
    """Build transformers' model."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        mlp_only_layers=[0],
        norm_topk_prob=True,
        tie_word_embeddings=False,
        use_cache=False,
    )
    yield other_step(Qwen3MoeForCausalLM(config), torch.nn.functional.cross_entropy)


def other_step(model: Any, cross_entropy: Any) -> tuple[Callable[[], float], int]:
    """Return a step as one writes it in plain torch, and the number of parameters."""
    import torch

    torch.set_num_threads(1)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.95)
    )
    batch = tokens()
    inputs, targets = batch[:, :-1], batch[:, 1:]

    def step() -> float:
        optimizer.zero_grad()
        output = model(inputs)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return step, sum(p.numel() for p in model.parameters())


def tokens() -> Any:
    """Return [rows, tokens + 1] random words."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCABULARY, (ROWS, TOKENS + 1), generator=generator)


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    names = ("torch", "transformers", "megatron-core")
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        **{name: importlib.metadata.version(name) for name in names},
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
    }


CONTESTANTS = {"ours": ours, "plain": plain, "hf": hf}


if __name__ == "__main__":
    main(sys.argv[1:])
