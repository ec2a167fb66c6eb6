"""Inside of the window first, then accuracy, then the earlier; nothing is left out silently."""

import json
from pathlib import Path

import pytest

from ring_train.checkpoint.manifest import Manifest, manifest_text
from ring_train.errors import UserError
from ring_train.jobs.select_checkpoint import Evaluated, main, rank
from ring_train.storage.files import FileRecord, write_durably

LOW, HIGH = 0.3, 0.5
BY_STEP = {100: (0.5, 0.9), 200: (0.7, 0.45), 300: (0.7, 0.35), 400: (0.9, 0.2), 500: (0.6, 0.4)}
"""Step -> accuracy and entropy."""


def evaluated(by_step: dict[int, tuple[float, float]]) -> list[Evaluated]:
    return [
        Evaluated(step=step, accuracy=accuracy, entropy_nats=entropy)
        for step, (accuracy, entropy) in by_step.items()
    ]


def order(by_step: dict[int, tuple[float, float]]) -> list[int]:
    return [item.step for item in rank(evaluated(by_step), LOW, HIGH)]


def test_the_window_goes_before_accuracy_and_ties_to_the_earlier() -> None:
    assert order(BY_STEP) == [200, 300, 500, 400, 100]
    assert order(dict(reversed(BY_STEP.items()))) == [200, 300, 500, 400, 100]


def test_the_edges_are_inside() -> None:
    ranking = rank(evaluated({1: (0.1, LOW), 2: (0.2, HIGH), 3: (0.9, 0.51)}), LOW, HIGH)
    assert [item.step for item in ranking] == [2, 1, 3]
    assert [item.distance_nats == 0 for item in ranking] == [True, True, False]
    assert ranking[-1].reason == "0.0100 above the window"


def test_outside_the_nearest_goes_first_whatever_its_accuracy() -> None:
    assert order({1: (0.9, 1.5), 2: (0.1, 0.25), 3: (0.5, 0.6)}) == [2, 3, 1]


def make_run(run: Path, by_step: dict[int, tuple[float, float]], saved: list[int]) -> Path:
    run.mkdir()
    lines = [
        json.dumps({"step": step, "accuracy": accuracy, "entropy_nats": entropy})
        for step, (accuracy, entropy) in by_step.items()
    ]
    (run / "evaluation.jsonl").write_text("".join(line + "\n" for line in lines))
    for step in saved:
        folder = run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        files: dict[str, FileRecord] = {
            name: write_durably(folder / name, [b"x"])
            for name in ("config.yaml", "train_state.json")
        }
        manifest = Manifest(step=step, saved_by={}, files=files, tensors={})
        (folder / "manifest.json").write_text(manifest_text(manifest))
    return run


def test_the_best_complete_checkpoint_is_on_the_last_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", BY_STEP, [100, 300, 500, 600])
    (run / "checkpoints" / "step_00000200").mkdir()  # not complete
    main([f"run={run}", f"output={tmp_path}/choice.json"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["1", "300"], ["2", "500"], ["3", "100"]]
    assert lines[4] == "no complete checkpoint of evaluated steps: 200, 400"
    assert lines[5] == "no evaluation of saved steps: 600"
    assert lines[-1] == f"{run}/checkpoints/step_00000300"
    choice = json.loads((tmp_path / "choice.json").read_text())
    assert choice["chosen"] == lines[-1]
    assert choice["is_inside"]
    assert [item["step"] for item in choice["ranking"]] == [300, 500, 100]


def test_without_one_inside_the_nearest_is_chosen_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", BY_STEP, list(BY_STEP))
    with pytest.raises(SystemExit) as stop:
        main([f"run={run}", "min_entropy=0.6", "max_entropy=0.8"])
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "no entropy is in [0.6, 0.8]: the nearest is chosen"
    assert lines[-1].endswith("step_00000100")


@pytest.mark.parametrize(
    ("by_step", "saved", "message"),
    [
        ({}, [100], "no evaluation of saved steps: 100; set evaluation.interval_steps"),
        ({100: (0.5, 0.4)}, [], "no complete checkpoint of evaluated steps: 100; set"),
        ({}, [], "nothing was saved or evaluated; set"),
    ],
)
def test_nothing_to_choose_from_is_an_error(
    by_step: dict[int, tuple[float, float]], saved: list[int], message: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", by_step, saved)
    with pytest.raises(UserError, match=message):
        main([f"run={run}"])


def test_figures_that_are_no_numbers_are_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", BY_STEP, [*BY_STEP, 600, 700])
    with (run / "evaluation.jsonl").open("a") as stream:
        stream.write('{"step": 600, "accuracy": 1.0, "entropy_nats": NaN}\n')
        stream.write('{"step": 700, "accuracy": null, "entropy_nats": 0.4}\n')
    main([f"run={run}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["1", "200"]
    assert lines[-2] == "set aside, accuracy or entropy is no number: 600, 700"
    assert len(lines) == 1 + len(BY_STEP) + 2


def test_only_evaluations_like_the_newest_are_ranked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", {100: (0.9, 0.4)}, [100, 200, 300])
    with (run / "evaluation.jsonl").open("a") as stream:
        for step, digest in ((200, "a"), (300, "b")):
            record = {"step": step, "accuracy": 0.5, "entropy_nats": 0.4, "digest": digest}
            stream.write(json.dumps({**record, "temperature": 0.0}) + "\n")
    main([f"run={run}"])
    _, ranked, aside, greedy, chosen = capsys.readouterr().out.splitlines()
    assert ranked.split()[:2] == ["1", "300"]
    expected = "set aside, evaluated on other problems or with other sampling: 100, 200"
    assert aside == expected
    assert greedy.startswith("answers were greedy: their entropy is lower")
    assert chosen.endswith("step_00000300")


def test_what_is_no_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no evaluation\.jsonl; name the folder of a run"):
        main([f"run={tmp_path}"])
    run = make_run(tmp_path / "run", BY_STEP, [100])
    with (run / "evaluation.jsonl").open("a") as stream:
        stream.write('{"step": 600}\n')
    with pytest.raises(UserError, match=r"evaluation\.jsonl:6 is no record of an evaluation"):
        main([f"run={run}"])
    with pytest.raises(UserError, match=r"min_entropy=0.6 and max_entropy=0.5 are no window"):
        main([f"run={run}", "min_entropy=0.6"])
