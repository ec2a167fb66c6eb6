"""The fine-tuning demo: the pretrained demo model learns to solve sums by working them out.

`make demo-sft` runs it, after `make demo` if that has not run. From the pretrained checkpoint: SFT
on generated arithmetic with worked chains, beside it a control that is shown answers alone for as
many steps, then evaluation on held-out problems. Every step is a command that a user types.
Everything is written to runs/demo-sft; finished steps are skipped (remove the folder to start
over).
"""

import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PRETRAINED = Path("runs/demo")
RUN_DIR = Path("runs/demo-sft")
DATA, EXPORT = RUN_DIR / "data", RUN_DIR / "export"
TOKENIZER = PRETRAINED / "data" / "tokenizer"
NUM_RANKS = 2
PROBLEMS = ("three_operands", "four_operands", "multiplication")
RUNS = {"chain": ["evaluation.template_arguments={enable_thinking: true}"], "answer": []}
"""Fine-tuning runs, named like their data, and how their problems are asked."""
SCHEDULES = {"chain": [], "answer": ["train.num_steps=450"]}
"""The control gets an eighth more steps, so that it trains at least as long on the clock."""
PRETRAINED_PROMPT = ["evaluation.prompt_format=text", "evaluation.max_new_tokens=130"]
"""The pretrained model knows problems as text; it solves one in about 90 tokens, then goes on."""
MINUTE_S = 60


def main() -> None:
    """Run all steps; a step that fails stops the demo with its own message."""
    started = time.monotonic()
    os.chdir(Path(__file__).resolve().parents[1])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    if not (PRETRAINED / "report.json").exists():
        step("the pretrained model first: make demo")
        subprocess.run([sys.executable, "tools/demo.py"], check=True)
        started = time.monotonic()
    build_data()
    evaluate("pretrained", PRETRAINED, ["three_operands"], PRETRAINED_PROMPT)
    for name, words in RUNS.items():
        train(name, words)
        evaluate(name, RUN_DIR / name, PROBLEMS if name == "chain" else PROBLEMS[:1], words)
    step("which checkpoint to go on from")
    # A model of this size is sure of what it knows, so the window begins at 0; status 1 says that
    # none is inside even so.
    select = [f"run={RUN_DIR / 'chain'}", "min_entropy=0.0"]
    subprocess.run(
        [sys.executable, "-m", "ring_train.jobs.select_checkpoint", *select], check=False
    )
    if not EXPORT.exists():
        step("export")
        run("ring_train.jobs.export", f"checkpoint={RUN_DIR / 'chain'}", f"output={EXPORT}")
    report = summary()
    (RUN_DIR / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(RUN_DIR / "evaluation.png")
    show(report)
    minutes = (time.monotonic() - started) / MINUTE_S
    say(f"\n{minutes:.1f} minutes. Figures: {RUN_DIR}/evaluation.json, over the steps:")
    say(f"{RUN_DIR}/evaluation.png, answers: {RUN_DIR}/*.answers.jsonl,")
    say(f"model: {EXPORT}")


def build_data() -> None:
    """Write conversations and held-out problems, and a shard of each kind of conversation."""
    if not (DATA / "manifest.json").exists():
        step("arithmetic conversations and problems")
        run("data_pipeline.math_conversations", f"output={DATA}")
    step("token shards with loss masks")
    missing = [name for name in RUNS if not (DATA / f"{name}.json").exists()]
    with ThreadPoolExecutor(NUM_RANKS) as pool:
        list(pool.map(tokenize, missing))
    run("data_pipeline.mask_viewer", f"shard={DATA / 'chain'}", f"tokenizer={TOKENIZER}")


def tokenize(name: str) -> None:
    """Write the shard of one kind of conversation."""
    files = [f"input={DATA / name}.jsonl", f"tokenizer={TOKENIZER}", f"output={DATA / name}"]
    thinking = ['template_arguments={"enable_thinking": true}'] if name == "chain" else []
    run("data_pipeline.tokenize", "format=chat", *files, *thinking)


def train(name: str, words: list[str]) -> None:
    """Fine-tune on two ranks; an interrupted run resumes."""
    step(f"SFT on {name} conversations, {NUM_RANKS} ranks, about three minutes")
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={NUM_RANKS}"]
    job = ["-m", "ring_train.jobs.sft", "experiment=demo_sft", f"run_dir={RUN_DIR / name}"]
    data = f"data.domains.math.path={DATA / name}"
    subprocess.run([sys.executable, *launcher, *job, data, *words, *SCHEDULES[name]], check=True)


def evaluate(
    name: str, checkpoint: Path, problems: tuple[str, ...] | list[str], words: list[str]
) -> None:
    """Let a checkpoint answer problems."""
    output = RUN_DIR / f"{name}.figures.json"
    if output.exists():
        return
    step(f"held-out problems answered by the model: {name}")
    run(
        "ring_train.jobs.evaluate",
        f"checkpoint={checkpoint}",
        *(f"evaluation.problems.{domain}={DATA / domain}.jsonl" for domain in problems),
        *("evaluation=greedy", "evaluation.max_new_tokens=200", "evaluation.max_batch_size=256"),
        *words,
        f"answers={RUN_DIR / name}.answers.jsonl",
        f"output={output}",
    )


def summary() -> dict[str, Any]:
    """Return the figures of the demo."""
    chain, answer, pretrained = (
        json.loads((RUN_DIR / f"{name}.figures.json").read_text())
        for name in ("chain", "answer", "pretrained")
    )
    first = PROBLEMS[0]
    report = {
        "accuracy": chain[f"accuracy/{first}"],
        "pretrained_accuracy": pretrained[f"accuracy/{first}"],
        "no_cot_accuracy": answer[f"accuracy/{first}"],
        "num_problems": int(chain[f"num_problems/{first}"]),
        "mean_entropy": chain[f"entropy_nats/{first}"],
        "mean_length_tokens": chain[f"length_tokens/{first}"],
    }
    report |= {f"accuracy/{name}": chain[f"accuracy/{name}"] for name in PROBLEMS[1:]}
    return report | {f"training_s/{name}": training_s(RUN_DIR / name) for name in RUNS}


def training_s(run_dir: Path) -> float:
    """Return the seconds that the steps of a run took, evaluation left out."""
    timing = records(run_dir / "timing.jsonl")
    starts = [0, *(record["step"] for record in timing)]
    steps = (end - start for start, end in itertools.pairwise(starts))
    return sum(count * record["step_s"] for count, record in zip(steps, timing, strict=True))


def draw(path: Path) -> None:
    """Draw accuracy and entropy of both runs over their steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    panels = {"accuracy": "accuracy, held-out sums", "entropy_nats": "token entropy (nats)"}
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for name in RUNS:
            found = records(RUN_DIR / name / "evaluation.jsonl")
            steps, values = [r["step"] for r in found], [r[key] for r in found]
            axis.plot(steps, values, marker="o", label=f"trained on {name}s")
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=100)


def show(report: dict[str, Any]) -> None:
    """Print the figures."""
    step(f"{report['num_problems']} held-out sums of three operands")
    rows = {
        "pretrained": report["pretrained_accuracy"],
        "trained on answers alone": report["no_cot_accuracy"],
        "trained on chains": report["accuracy"],
    }
    for name, accuracy in rows.items():
        say(f"{name:32}{accuracy:8.1%}")
    for name in PROBLEMS[1:]:
        title = f"  {name.replace('_', ' ')}, never trained"
        say(f"{title:32}{report[f'accuracy/{name}']:8.1%}")
    for name in RUNS:
        say(f"{report[f'training_s/{name}']:.0f} s of training on {name} conversations")


def records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


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
