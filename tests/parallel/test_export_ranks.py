"""Several ranks write the files of one folder, which appears on none of them if one fails."""

import errno
from pathlib import Path

import pytest

from tests.conftest import OnRanks, RankError
from tests.unit.hf.conftest import GOLDEN


def export(output: Path, max_shard_bytes: int, failing: str | None = None) -> list[str]:
    """Write the golden hybrid; return the files that this rank wrote."""
    from ring_train.config import DecayLayerRule, WeightFormat
    from ring_train.hf import writer
    from ring_train.hf.config import read_model_config
    from ring_train.hf.reader import open_hf_folder
    from ring_train.runtime.ranks import start_ranks

    written = []
    write_synced = writer.write_synced

    def spy(path: Path, chunks: object) -> int:
        if path.name == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path.name)
        return write_synced(path, chunks)  # pyrefly: ignore[bad-argument-type]

    writer.write_synced = spy
    source = GOLDEN / "ring_linear_v2"
    model = read_model_config(source, DecayLayerRule.zero_based)
    with start_ranks() as ranks, open_hf_folder(source, model) as reader:
        writer.write_hf_folder(
            output,
            model,
            reader.read_logical,
            form=writer.HfFormat(weights=WeightFormat.fp32, max_shard_bytes=max_shard_bytes),
            tokenizer_dir=source,
            ranks=ranks,
        )
    return written


def test_ranks_share_the_files_and_the_folder_is_that_of_one(
    on_ranks: OnRanks, tmp_path: Path
) -> None:
    (alone,) = on_ranks(1, export, tmp_path / "one", 500_000)
    shares = on_ranks(3, export, tmp_path / "three", 500_000)
    assert len(alone) > 6
    assert sorted(name for share in shares for name in share) == sorted(alone)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "three" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_full_disk_on_one_rank_is_an_error_on_all_and_leaves_nothing(
    num_ranks: int, on_ranks: OnRanks, tmp_path: Path
) -> None:
    failing = "model-00002-of-00008.safetensors"
    with pytest.raises(RankError, match=r"could not be written .*No space left.*make room"):
        on_ranks(num_ranks, export, tmp_path / "out", 500_000, failing)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_less_room_than_the_weights_need_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    import shutil

    from ring_train.hf.errors import HfError
    from ring_train.hf.transaction import write_folder

    free_bytes = shutil.disk_usage(tmp_path).free
    with pytest.raises(HfError, match=f"needs {2 * free_bytes} bytes, but .* are free"):
        write_folder(tmp_path / "out", lambda path: None, needed_bytes=2 * free_bytes)
    assert list(tmp_path.iterdir()) == []
