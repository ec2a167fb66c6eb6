"""Which lines reach stderr, on which rank."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def _restored_loggers() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("ring_train")
    before = (list(root.handlers), root.level, ours.level)
    yield
    root.handlers[:], root.level, ours.level = before[0], before[1], before[2]


def lines_of(rank: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    from ring_train.runtime.logs import start_logs

    start_logs(7)  # a later call replaces an earlier one
    start_logs(rank)
    logging.getLogger("ring_train.train.loop").info("step %s", 1)
    logging.getLogger("ring_train.data").warning("short shard")
    logging.getLogger("megatron.core").info("chatter")
    logging.getLogger("megatron.core").warning("upstream warns")
    return [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]


@pytest.mark.usefixtures("_restored_loggers", "warm_megatron")
def test_rank_0_tells_everything_and_other_ranks_only_our_warnings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert lines_of(0, capsys) == ["I step 1", "W short shard", "W upstream warns"]
    assert lines_of(3, capsys) == ["W [rank 3] short shard"]


@pytest.mark.usefixtures("warm_megatron")
@pytest.mark.parametrize(
    ("wanted", "rank", "shown"), [(True, 0, True), (True, 1, False), (None, 0, False)]
)
def test_the_bar_is_shown_where_it_is_wanted(
    wanted: bool | None, rank: int, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from ring_train.runtime.logs import progress_bar

    with progress_bar(first_step=3, num_steps=10, wanted=wanted, rank=rank) as bar:
        bar.update()
    assert ("4/10" in capsys.readouterr().err) is shown
