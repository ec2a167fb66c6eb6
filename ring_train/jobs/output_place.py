"""Where jobs may write a Hugging Face folder."""

from pathlib import Path

from ring_train.errors import UserError


def check_output_place(output: str) -> None:
    """Raise a UserError if an output would lie in a checkpoint or among checkpoints of a run."""
    from ring_train.checkpoint.folders import checkpoint_around

    around = checkpoint_around(Path(output))
    if around is not None:
        raise UserError(
            f"output={output} lies in {around}, where what is no checkpoint stops a run or is "
            "removed with one; choose a path outside"
        )
