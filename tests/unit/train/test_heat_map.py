"""What routers did becomes a picture in which balance, overload and death can be told apart."""

import json
from pathlib import Path

import numpy as np
import pytest

from ring_train.train.heat_map import (
    CELL_PIXELS,
    colours,
    doublings,
    load_image,
    read_loads,
    write_heat_map,
)


def write_loads(run_dir: Path, steps: int, experts: int = 8, layers: int = 3) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, steps + 1):
        counts = rng.integers(1, 50, (layers, experts)).tolist()
        lines.append(json.dumps({"step": step, "layers": dict(enumerate(counts, start=2))}))
    (run_dir / "loads.jsonl").write_text("\n".join(lines) + "\n")


def test_balance_is_white_more_is_red_less_is_blue_and_none_is_black() -> None:
    counts = np.array([0.0, 10.0, 20.0, 40.0, 30.0])
    values = doublings(counts)
    assert values[[1, 2, 3]] == pytest.approx([-1, 0, 1])
    dead, less, equal, more, _ = colours(values)
    assert dead.tolist() == [0, 0, 0]
    assert equal.tolist() == [1, 1, 1]
    assert less[2] > less[0]
    assert more[0] > more[2]


def test_a_layer_without_any_token_is_dead_rather_than_an_error() -> None:
    assert np.isneginf(doublings(np.zeros((2, 4)))).all()


def test_layers_of_an_image_are_in_the_order_of_their_numbers() -> None:
    image = load_image({10: [0, 4], 9: [2, 2]})
    assert image.shape == (2 * CELL_PIXELS, 2 * CELL_PIXELS, 3)
    assert image.dtype == np.uint8
    assert (image[0, 0] == 255).all()
    assert (image[-1, 0] == 0).all()


def test_records_that_are_torn_or_of_another_width_are_left_out(tmp_path: Path) -> None:
    write_loads(tmp_path, 3)
    with (tmp_path / "loads.jsonl").open("a") as file:
        file.write('{"step": 4, "layers": {"2": [1, 2]}}\n{"step": 99999\n')
        more = {str(n): [1] * 8 for n in (2, 3, 4, 9)}
        file.write(json.dumps({"step": 4, "layers": more}) + "\n")
    write = json.dumps({"step": 5, "layers": {str(n): [1] * 8 for n in (2, 3, 4)}})
    with (tmp_path / "loads.jsonl").open("a") as file:
        file.write(write + "\n")
    loads = read_loads(tmp_path / "loads.jsonl")
    assert loads is not None
    assert loads.steps.tolist() == [1, 2, 3, 5]
    assert loads.layers == (2, 3, 4)
    assert loads.counts.shape == (4, 3, 8)


@pytest.mark.parametrize(("steps", "layers", "experts"), [(1, 1, 2), (3, 2, 8), (900, 30, 16)])
def test_a_picture_is_drawn_of_any_size(
    steps: int, layers: int, experts: int, tmp_path: Path
) -> None:
    write_loads(tmp_path, steps, experts, layers)
    path = write_heat_map(tmp_path, "a run")
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_run_without_routers_has_no_picture(tmp_path: Path) -> None:
    assert write_heat_map(tmp_path, "a run") is None
