"""What the scripts of slurm/ do around their ranks: exit status, requeue, restarts, bad input.

Slurm is a folder of stubs (stubs.py) and a rank is a play; the checks before ranks are the real
ones. The real Slurm is in tests/slurm_real.
"""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.stubs import FakeSlurm

pytestmark = pytest.mark.timeout(60)
PRETRAIN = "slurm/pretrain.sh"


def journal(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "run/journal.jsonl").read_text().splitlines()]


def test_words_reach_every_rank_as_they_were_written(slurm: FakeSlurm, words: list[str]) -> None:
    slurm.environment["REAL_CHECKS"] = "1"
    folder = slurm.folder.parent
    (folder / "a b=c.idx").touch()
    odd = [f"data.domains.x.path='{folder}/a b=c'", "resilience.skip_steps=[3, 5]"]
    done = slurm.run(PRETRAIN, *words, *odd)
    assert done.status == 0, done.stderr
    assert slurm.ranks() == [["-m", "ring_train.jobs.pretrain", *words, *odd]]


def test_ranks_get_their_place_from_slurm(slurm: FakeSlurm, words: list[str]) -> None:
    assert slurm.run(PRETRAIN, *words).status == 0
    seen = slurm.rank_environment()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert place.items() <= seen.items()
    assert (seen["MASTER_ADDR"], seen["MASTER_PORT"]) == ("127.0.0.7", "15007")
    assert int(seen["RING_TRAIN_DEADLINE"]) > 1.7e9
    assert seen["TORCH_FR_DUMP_TEMP_FILE"].endswith("/run/stacks/collectives_7_")
    [call] = slurm.calls("srun")
    assert {"--nodes=2", "--ntasks=4", "--kill-on-bad-exit=0", "--wait=60"} <= set(call)


def test_a_setting_that_was_exported_stays(slurm: FakeSlurm, words: list[str]) -> None:
    slurm.environment |= {"NCCL_DEBUG": "INFO", "RING_TRAIN_INTERFACE": "ib0"}
    slurm.run(PRETRAIN, *words)
    seen = slurm.rank_environment()
    assert (seen["NCCL_DEBUG"], seen["GLOO_SOCKET_IFNAME"]) == ("INFO", "ib0")


def test_a_finished_run_is_told_and_releases_who_waits(
    slurm: FakeSlurm, words: list[str], tmp_path: Path
) -> None:
    done = slurm.run(PRETRAIN, *words)
    assert done.status == 0
    assert (journal(tmp_path)[-1]["event"], journal(tmp_path)[-1]["job_id"]) == ("job_done", "7")
    assert (tmp_path / "run/logs/pretrain-7.log").read_text() == "a log\n"
    assert not [words for words in slurm.calls("scontrol") if words[0] == "requeue"]


def test_a_requeue_after_the_end_does_nothing(slurm: FakeSlurm, words: list[str]) -> None:
    assert slurm.run(PRETRAIN, *words).status == 0
    again = slurm.run(PRETRAIN, *words)
    assert again.status == 1
    assert "job 7 was started again, but it has finished the run" in again.problem
    assert len(slurm.ranks()) == 1


def test_another_job_goes_on_with_a_finished_run(slurm: FakeSlurm, words: list[str]) -> None:
    slurm.plays({"status": 0}, {"status": 0})
    assert slurm.run(PRETRAIN, *words).status == 0
    slurm.environment["SLURM_JOB_ID"] = "8"
    assert slurm.run(PRETRAIN, *words).status == 0
    assert len(slurm.ranks()) == 2


def test_a_node_that_died_after_the_end_costs_no_second_run(
    slurm: FakeSlurm, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/outcome.json").write_text(json.dumps({"state": "finished", "job_id": "7"}))
    done = slurm.run(PRETRAIN, *words)
    assert done.status == 0
    assert "was finished by this job" in done.stdout
    assert not slurm.ranks()
    assert journal(tmp_path)[-1]["event"] == "job_done"


def test_a_run_that_stopped_is_requeued_and_never_ends_well(
    slurm: FakeSlurm, words: list[str], tmp_path: Path
) -> None:
    slurm.plays({"status": 75, "saves": [4]})
    done = slurm.run(PRETRAIN, *words)
    assert done.status == 75
    assert ["requeue", "7"] in slurm.calls("scontrol")
    assert journal(tmp_path)[-1] | {"event": "job_requeue", "step": 4} == journal(tmp_path)[-1]


def test_a_signal_reaches_the_ranks_and_ends_in_a_requeue(
    slurm: FakeSlurm, words: list[str]
) -> None:
    slurm.plays({"status": 0, "saves": [4], "waits": True})
    script = slurm.start(PRETRAIN, *words)
    while not (slurm.folder / "waiting").exists() and script.poll() is None:
        time.sleep(0.05)
    script.send_signal(signal.SIGUSR1)
    output, _ = script.communicate()
    assert script.returncode == 75
    assert "stopped (USR1) at step 4; requeueing" in output
    assert ["requeue", "7"] in slurm.calls("scontrol")


@pytest.mark.parametrize("state", ["COMPLETING", ""])
def test_a_job_that_is_cancelled_is_not_brought_back(
    slurm: FakeSlurm, words: list[str], state: str
) -> None:
    slurm.plays({"status": 75, "saves": [4]})
    (slurm.folder / "state").write_text(state)
    slurm.environment["RING_TRAIN_PAUSE_S"] = "0"
    assert slurm.run(PRETRAIN, *words).status == 75
    assert ["requeue", "7"] not in slurm.calls("scontrol")


def test_where_requeue_is_impossible_the_job_fails(slurm: FakeSlurm, words: list[str]) -> None:
    slurm.plays({"status": 75})
    (slurm.folder / "cannot_requeue").touch()
    slurm.environment["RING_TRAIN_PAUSE_S"] = "0"
    done = slurm.run(PRETRAIN, *words)
    assert done.status == 75
    assert "submit the same command again" in done.problem


def test_requeues_end_where_nothing_is_gained(
    slurm: FakeSlurm, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    line = '{"time": 1, "event": "job_requeue", "attempt": 1, "rank": 0, "step": 0, "job_id": "7"}'
    (tmp_path / "run/journal.jsonl").write_text(f"{line}\n" * 3)
    slurm.plays({"status": 75})
    done = slurm.run(PRETRAIN, *words)
    assert done.status == 1
    assert "requeued 3 times at step 0" in done.problem
    assert ["requeue", "7"] not in slurm.calls("scontrol")


def test_mistakes_of_a_person_are_not_tried_again(slurm: FakeSlurm, words: list[str]) -> None:
    slurm.plays({"status": 2})
    assert slurm.run(PRETRAIN, *words).status == 2
    assert len(slurm.ranks()) == 1


def test_dead_ranks_start_again_in_the_job_while_it_gets_further(
    slurm: FakeSlurm, words: list[str]
) -> None:
    deaths = [{"status": status, "saves": [step]} for step, status in enumerate((70, -9, 1), 1)]
    slurm.plays(*deaths, {"status": -9}, {"status": 0})
    slurm.environment["RING_TRAIN_PAUSE_S"] = "0"
    done = slurm.run(PRETRAIN, *words)
    assert done.status == 0, done.stderr
    assert len(slurm.ranks()) == 5
    assert "1 of 3 starts without progress" in done.stdout


def test_dead_ranks_are_given_up_after_three_starts_without_progress(
    slurm: FakeSlurm, words: list[str]
) -> None:
    slurm.plays({"status": 1, "saves": [2]}, *[{"status": -9}] * 9)
    slurm.environment["RING_TRAIN_PAUSE_S"] = "0"
    done = slurm.run(PRETRAIN, *words)
    assert done.status == 137
    assert "died (status 137) 4 times at step 2" in done.problem
    assert len(slurm.ranks()) == 5


def test_ranks_that_die_after_the_last_save_have_finished(
    slurm: FakeSlurm, words: list[str]
) -> None:
    slurm.plays({"status": -9, "outcome": {"state": "finished", "job_id": "7"}})
    done = slurm.run(PRETRAIN, *words)
    assert done.status == 0
    assert "after the last step was saved" in done.stdout


def test_the_most_nodes_that_the_plan_is_legal_on_are_used(
    slurm: FakeSlurm, words: list[str]
) -> None:
    slurm.environment["REAL_CHECKS"] = "1"
    slurm.environment |= {"SLURM_JOB_NUM_NODES": "3", "SLURM_TASKS_PER_NODE": "2(x3)"}
    done = slurm.run(PRETRAIN, *words)
    assert done.status == 0
    assert "using 2 of 3 nodes" in done.stdout
    assert {"--nodes=2", "--ntasks=4"} <= set(slurm.calls("srun")[0])


def test_a_plan_that_does_not_fit_fails_before_any_rank(
    slurm: FakeSlurm, words: list[str], tmp_path: Path
) -> None:
    slurm.environment["REAL_CHECKS"] = "1"
    done = slurm.run(PRETRAIN, *words, "parallel.tensor_model_parallel_size=8")
    assert done.status == 2
    assert "pretrain on 4 ranks: " in done.problem
    assert not slurm.calls("srun")
    assert not (tmp_path / "run").exists()


def test_a_typo_names_the_right_key(slurm: FakeSlurm, words: list[str]) -> None:
    slurm.environment["REAL_CHECKS"] = "1"
    done = slurm.run(PRETRAIN, *words, "optim.lrr=1")
    assert done.status == 2
    assert done.problem == "error: optim.lrr is not a key; did you mean optim.lr?"
    assert not slurm.calls("srun")


def test_another_folder_is_not_the_repository(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.environment["SLURM_SUBMIT_DIR"] = str(tmp_path)
    for name in ("pretrain", "sft", "export", "data", "build_index"):
        done = slurm.run(f"slurm/{name}.sh")
        assert done.status == 2
        assert f"{tmp_path} is not the repository" in done.problem
    done = slurm.run("slurm/pipeline.sh", cwd=tmp_path)
    assert (done.status, "is not the repository" in done.problem) == (2, True)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set, so this is no Slurm job"),
        ({"SLURM_JOB_NODELIST": ""}, "SLURM_JOB_NODELIST is not set in job 7"),
        ({"SLURM_TASKS_PER_NODE": "2,1"}, "nodes differ in their number of ranks"),
        ({"SLURM_JOB_NUM_NODES": "3"}, "contradicts SLURM_JOB_NUM_NODES=3"),
        ({"SLURM_JOB_NUM_NODES": "two"}, "is not a number of nodes"),
        ({"SLURM_NTASKS_PER_NODE": "8"}, "SLURM_NTASKS_PER_NODE=8 contradicts"),
        ({"RING_CONTAINER": "no.sqsh"}, "RING_CONTAINER=no.sqsh is not a file"),
        ({"RING_TRAIN_PYTHON": "no/python"}, "RING_TRAIN_PYTHON=no/python is not there"),
    ],
)
def test_a_wrong_environment_is_named(
    slurm: FakeSlurm, words: list[str], changed: dict[str, str], problem: str
) -> None:
    slurm.environment |= changed
    done = slurm.run(PRETRAIN, *words)
    assert done.status == 2
    assert problem in done.problem
    assert not slurm.calls("srun")


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"SLURM_PROCID": ""}, "SLURM_PROCID is not set"),
        ({"SLURM_PROCID": "4"}, "SLURM_PROCID=4 is not below SLURM_STEP_NUM_TASKS=4"),
        ({"SLURM_LOCALID": "2"}, "SLURM_LOCALID=2 is not below the 2 ranks of node 0"),
        ({"SLURM_STEP_NUM_TASKS": "5"}, "contradicts SLURM_STEP_NUM_TASKS=5"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "use --gpus-per-node=2"),
    ],
)
def test_a_rank_refuses_a_wrong_place(
    slurm: FakeSlurm, changed: dict[str, str], problem: str
) -> None:
    place = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    slurm.environment |= {**place, **step, "MASTER_ADDR": "a", "MASTER_PORT": "1", **changed}
    done = slurm.run("slurm/rank.sh", "ring_train.jobs.pretrain")
    assert done.status == 2
    assert problem in done.problem
    assert not slurm.ranks()


def test_a_run_folder_that_cannot_be_made_is_named(
    slurm: FakeSlurm, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run").write_text("a file")
    done = slurm.run(PRETRAIN, *words)
    assert done.status == 2
    assert f"run_dir={tmp_path}/run cannot be written" in done.problem
    assert (tmp_path / "run").read_text() == "a file"


def test_a_shard_that_is_missing_is_named(slurm: FakeSlurm, words: list[str]) -> None:
    slurm.environment["REAL_CHECKS"] = "1"
    done = slurm.run(PRETRAIN, *words, "data.domains.web.path=nowhere/web")
    assert done.status == 2
    assert "there is no nowhere/web.idx" in done.problem


def test_the_check_on_the_login_node_prints_the_plan(slurm: FakeSlurm, words: list[str]) -> None:
    for name in [name for name in slurm.environment if name.startswith("SLURM_")]:
        del slurm.environment[name]
    done = slurm.run(PRETRAIN, "--check", "--nodes=2", "--ntasks-per-node=2", *words)
    assert done.status == 0, done.stderr
    assert "checked for           4 ranks" in done.stdout
    done = slurm.run(PRETRAIN, "--check", "--nodes=4", *words)
    assert done.status == 2
    assert "pretrain on 32 ranks: train.global_batch_size=4" in done.problem
    assert not slurm.calls("srun")
