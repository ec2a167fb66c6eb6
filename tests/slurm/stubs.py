"""A Slurm of shell scripts: commands on PATH that record how they are called, and run one rank."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.repo.files import ROOT

RECORD = """#!{python} -IS
import json, os, sys
with open({calls!r}, "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""
"""The beginning of each stub."""
SRUN = """
words = sys.argv[1:]
start = next(i for i, word in enumerate(words) if not word.startswith("-"))
options = dict(word.lstrip("-").partition("=")[::2] for word in words[:start])
tasks, nodes = int(options["ntasks"]), int(options["nodes"])
os.environ |= dict(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
os.environ |= dict(SLURM_STEP_NUM_TASKS=str(tasks))
os.environ |= dict(SLURM_STEP_TASKS_PER_NODE=f"{tasks // nodes}(x{nodes})")
os.execvp(words[start], words[start:])
"""
APPTAINER = """
words = sys.argv[1:]
start = next(i for i, word in enumerate(words) if word.endswith(".sif"))
os.execvp(words[start + 1], words[start + 1:])
"""
SCONTROL = """
folder = os.environ["STUBS"]
if sys.argv[1:3] == ["show", "hostnames"]:
    print("node0\\nnode1")
elif sys.argv[1:4] == ["-o", "show", "node"]:
    print("NodeName=node0 NodeAddr=127.0.0.7 NodeHostName=node0")
elif sys.argv[1:3] == ["show", "job"]:
    print(f"JobId=7 JobName=pretrain\\n   StdOut={folder}/pretrain-7.log")
elif os.path.exists(f"{folder}/cannot_requeue"):
    sys.exit("requeue is disabled")
"""
SQUEUE = """
state = os.path.join(os.environ["STUBS"], "state")
answers = {"%T": open(state).read(), "%l": "1:00:00", "%e": "2026-11-30T08:00:00"}
print(answers[sys.argv[-1]])
"""
SBATCH = """
folder = os.environ["STUBS"]
script = next(word for word in sys.argv if word.endswith(".sh"))
if os.path.exists(f"{folder}/refuses_{os.path.basename(script)}"):
    sys.exit("sbatch: error: invalid partition specified: nowhere")
if os.path.exists(f"{folder}/fails_{os.path.basename(script)}") and "--test-only" not in sys.argv:
    sys.exit("sbatch: error: QOSMaxSubmitJobPerUserLimit")
number = sum("--parsable" in line for line in open(__CALLS__)) + 100
print(number if "--parsable" in sys.argv else "")
"""
PYTHON = """
if sys.argv[1:3] == ["slurm/check.py", "job"] and "REAL_CHECKS" not in os.environ:
    run_dir = next(word.partition("=")[2] for word in sys.argv if word.startswith("run_dir="))
    print("4", run_dir, sep="\t")
    sys.exit()
if sys.argv[1] == "slurm/check.py":
    os.execv(__PYTHON__, [__PYTHON__, *sys.argv[1:]])
import signal, time
folder = os.environ["STUBS"]
starts = sum('"python", "-m"' in line for line in open(__CALLS__))
with open(f"{folder}/plays.json") as file:
    play = json.load(file)[starts - 1]
with open(f"{folder}/environment.json", "w") as file:
    json.dump(dict(os.environ), file)
def stop(*_):
    os._exit(75)
signal.signal(signal.SIGUSR1, stop)
run_dir = os.environ.get("RING_TRAIN_RUN_DIR", folder)
for step in play.get("saves", []):
    os.makedirs(f"{run_dir}/checkpoints/step_{step:08d}")
if "outcome" in play:
    with open(f"{run_dir}/outcome.json", "w") as file:
        json.dump(play["outcome"], file)
if play.get("waits"):
    open(f"{folder}/waiting", "w").close()
    time.sleep(60)
if play["status"] < 0:
    os.kill(os.getpid(), -play["status"])
sys.exit(play["status"])
"""
"""Does what the next play says: saves steps, waits for a signal, ends with a status.

The check of a job, which costs a second, accepts all words on four ranks unless REAL_CHECKS is set.
"""
STUBS = {
    **{"srun": SRUN, "apptainer": APPTAINER, "scontrol": SCONTROL, "squeue": SQUEUE},
    **{"sbatch": SBATCH, "scancel": "", "python": PYTHON, "python3": PYTHON},
}


@dataclass
class Ended:
    """What a script left."""

    status: int
    stdout: str
    stderr: str

    @property
    def problem(self) -> str:
        """The one line of its error."""
        [line] = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        return line


@dataclass
class FakeSlurm:
    """The stubs in a folder, and the environment of a job of two nodes and two tasks each."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, body in STUBS.items():
            path = self.folder / "bin" / name
            path.parent.mkdir(exist_ok=True, parents=True)
            record = RECORD.format(python=sys.executable, calls=str(self.calls_file))
            known = body.replace("__CALLS__", repr(str(self.calls_file)))
            path.write_text(record + known.replace("__PYTHON__", repr(sys.executable)))
            path.chmod(0o755)
        self.calls_file.touch()
        (self.folder / "state").write_text("RUNNING")
        (self.folder / "pretrain-7.log").write_text("a log\n")
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RING_"))}
        outside.pop("CUDA_VISIBLE_DEVICES", None)
        self.environment = {
            **outside,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "STUBS": str(self.folder),
            "RING_TRAIN_PYTHON": f"{self.folder}/bin/python",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_TASKS_PER_NODE": "2(x2)",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_SUBMIT_DIR": str(ROOT),
        }

    @property
    def calls_file(self) -> Path:
        return self.folder / "calls.jsonl"

    def calls(self, command: str) -> list[list[str]]:
        """Return the arguments of each call of a command."""
        calls = [json.loads(line) for line in self.calls_file.read_text().splitlines()]
        return [words for name, *words in calls if name == command]

    def ranks(self) -> list[list[str]]:
        """Return the arguments with which Python was started in each rank."""
        return [words for words in self.calls("python") if words[0] == "-m"]

    def plays(self, *plays: Mapping[str, object]) -> None:
        """Say what the starts of ranks do, one after another."""
        (self.folder / "plays.json").write_text(json.dumps(plays))

    def run(self, script: str, *words: str, cwd: Path = ROOT) -> Ended:
        """Run a script to its end."""
        line = ["bash", str(ROOT / script), *words]
        done = subprocess.run(
            line, cwd=cwd, env=self.environment, capture_output=True, text=True, check=False
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def start(self, script: str, *words: str) -> subprocess.Popen[str]:
        """Start a script."""
        return subprocess.Popen(
            ["bash", script, *words],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def rank_environment(self) -> dict[str, str]:
        """Return the environment of the last rank that was started."""
        return json.loads((self.folder / "environment.json").read_text())
