"""The demo: from source text on this machine to a trained, exported model that writes text.

`make demo` runs it. Every step is a command that a user types; this file only strings them
together, prints what each one takes, and compares the result with simple baselines. Everything is
written to runs/demo; run it again and finished steps are skipped (remove the folder to start over).
"""

import json
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RUN_DIR = Path("runs/demo")
CORPUS, CURATED = RUN_DIR / "corpus", RUN_DIR / "curated"
DATA, EXPORT = RUN_DIR / "data", RUN_DIR / "export"
DOMAINS = ("code", "math", "prose")
PAGE = RUN_DIR / "data.html"
NUM_RANKS = 2
VOCAB_SIZE = 2048
NUM_SAMPLES = 50
TOP_P = 0.9
PROMPTS = ("def __init__(self, ", "The function returns ", "Compute 27 + 45 - 13.")


def main() -> None:
    """Run all steps; a step that fails stops the demo with its own message."""
    started = time.monotonic()
    os.chdir(Path(__file__).resolve().parents[1])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # transformers warns of the released spelling of rope keys at every load.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    warnings.simplefilter("ignore", FutureWarning)
    build_data()
    train()
    export()
    report = {"domains": compare_with_baselines(), "math": sample_math()}
    (RUN_DIR / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    for prompt in PROMPTS:
        say(f"\n--- the model continues {prompt!r}")
        run("ring_train.jobs.generate", f"hf_dir={EXPORT}", f"prompt='{prompt}'", MAX_NEW)
    account()
    minutes = (time.monotonic() - started) / 60
    say(f"\n{minutes:.1f} minutes. Curves: {RUN_DIR}/curves.png, report: {RUN_DIR}/report.json,")
    say(f"data: {PAGE};")
    say(f"model: {EXPORT}; tensorboard --logdir {RUN_DIR}/tensorboard shows every figure.")


MAX_NEW = "max_new_tokens=80"


def build_data() -> None:
    """Build and curate the corpus; train the tokenizer; write a shard per domain and split."""
    if not (CORPUS / "manifest.json").exists():
        step("corpus from the Python files of this machine")
        run("data_pipeline.demo_corpus", f"output={CORPUS}")
    if not (DATA / "tokenizer" / "tokenizer.json").exists():
        step("tokenizer")
        run(
            "data_pipeline.train_tokenizer",
            f"input={CORPUS}/*.train.jsonl",
            f"output={DATA / 'tokenizer'}",
            f"vocab_size={VOCAB_SIZE}",
        )
    if not (CURATED / "curation.json").exists():
        step("curation: what is there twice, or like the held-out text, goes")
        run(
            "data_pipeline.curate",
            "curation=demo",
            f"input={CORPUS}/*.train.jsonl",
            f"output={CURATED}",
            f"workers={NUM_RANKS}",
            "block_documents=500",
        )
    step("token shards")
    shards = {f"{CURATED}/{d}-*.jsonl": DATA / d for d in DOMAINS}
    shards |= {f"{CORPUS}/{d}.valid.jsonl": DATA / f"{d}_valid" for d in DOMAINS}
    missing = {source: prefix for source, prefix in shards.items() if not _is_done(prefix)}
    with ThreadPoolExecutor(NUM_RANKS) as pool:
        list(pool.map(lambda item: _tokenize(*item), missing.items()))


def _is_done(prefix: Path) -> bool:
    return prefix.with_suffix(".json").exists()


def _tokenize(source: str, prefix: Path) -> None:
    run(
        "data_pipeline.tokenize",
        f"input={source}",
        f"tokenizer={DATA / 'tokenizer'}",
        f"output={prefix}",
    )


def train() -> None:
    """Pretrain on two ranks that share the experts; an interrupted run resumes."""
    step(f"training on {NUM_RANKS} ranks, about five minutes")
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={NUM_RANKS}"]
    subprocess.run(
        [sys.executable, *launcher, "-m", "ring_train.jobs.pretrain", "experiment=demo"],
        check=True,
    )


def export() -> None:
    """Export the newest checkpoint."""
    if not EXPORT.exists():
        step("export")
        run("ring_train.jobs.export", f"checkpoint={RUN_DIR}", f"output={EXPORT}", "precision=fp32")


def compare_with_baselines() -> dict[str, dict[str, float]]:
    """Print and return the validation loss per domain beside what counting words would reach."""
    from ring_train.config import read_yaml
    from ring_train.data.baselines import measure_baselines
    from ring_train.data.loader import build_batches
    from ring_train.plan import make_plan

    step("held-out loss per token, in nats")
    batches = build_batches(make_plan(read_yaml(RUN_DIR / "config.yaml"), NUM_RANKS))
    last = json.loads((RUN_DIR / "validation.jsonl").read_text().splitlines()[-1])
    say(f"{'domain':8}{'model':>8}{'bigram':>8}{'unigram':>9}{'below unigram':>15}")
    figures = {}
    for domain in batches.domains:
        baselines = measure_baselines(batches, domain)
        model = last[f"valid_loss/{domain}"]
        gain = baselines.unigram_nats - model
        bigram, unigram = baselines.bigram_nats, baselines.unigram_nats
        say(f"{domain:8}{model:8.3f}{bigram:8.3f}{unigram:9.3f}{gain:15.3f}")
        figures[domain] = {"model": model, "bigram": bigram, "unigram": unigram, "gain": gain}
    return figures


def account() -> None:
    """Compare what was read with the plan, say where the first sample comes from, draw the data."""
    step("what the run has read")
    run("ring_train.jobs.prove_mixture", f"run={RUN_DIR}")
    run("ring_train.jobs.explain", f"run={RUN_DIR}", "sample=0")
    run(
        "data_pipeline.report",
        f"output={PAGE}",
        f"curation={CURATED}",
        f"shards={DATA}/*.json",
        f"run={RUN_DIR}",
    )


def sample_math() -> dict[str, float]:
    """Sample math lines from the export; return how many parse and how many are right."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    from data_pipeline.math_problems import is_correct, parse_math_line

    step(f"{NUM_SAMPLES} sampled math lines")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(EXPORT)
    model = AutoModelForCausalLM.from_pretrained(
        EXPORT, trust_remote_code=True, dtype=torch.float32
    )
    ids = tokenizer("Compute", return_tensors="pt").input_ids.repeat(NUM_SAMPLES, 1)
    sequences = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_p=TOP_P,
        top_k=0,
        max_new_tokens=160,
    )
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    lines = [text.split("\n", 1)[0] for text in texts]
    parsed = [problem for line in lines if (problem := parse_math_line(line)) is not None]
    correct = sum(is_correct(problem) for problem in parsed)
    say("\n".join(lines[:5]))
    say(f"{len(parsed)} of {NUM_SAMPLES} parse as the generated format, {correct} are right")
    return {"samples": NUM_SAMPLES, "top_p": TOP_P, "parsed": len(parsed), "correct": correct}


def run(module: str, *arguments: str) -> None:
    """Run one of the project's commands and stop if it fails."""
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def step(title: str) -> None:
    """Announce a step."""
    say(f"\n== {title}")


def say(text: str) -> None:
    """Write a line for the person who watches."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
