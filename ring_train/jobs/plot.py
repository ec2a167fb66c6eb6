"""Draw the pictures of a run again: `python -m ring_train.jobs.plot run_dir=RUN_DIR`.

For a run that is under way, or that was killed: curves.png, experts.png (how routers use their
experts), goodput.png (where the time went) and stragglers.png (slow ranks), each where the folder
has the records for it.
"""

import sys
from pathlib import Path

from ring_train.config import PlotConfig, compose
from ring_train.errors import UserError
from ring_train.jobs.run_files import check_run_folder, read_record
from ring_train.runtime.errors import run_job


def main(overrides: list[str]) -> None:
    """Draw the pictures of the run that the overrides name."""
    config: PlotConfig = compose("plot", overrides)
    run_dir = Path(config.run_dir)
    check_run_folder(run_dir)
    num_parameters = read_record(run_dir / "plan.json").get("num_parameters")

    from ring_train.train.plots import draw_run

    try:
        pictures = draw_run(run_dir, num_parameters if isinstance(num_parameters, int) else 0)
    except OSError as error:
        raise UserError(f"run_dir={run_dir}: no picture could be written ({error})") from None
    if not pictures:
        raise UserError(
            f"run_dir={run_dir} has no records to draw yet; wait for logging.interval_steps steps"
        )
    sys.stdout.write("".join(f"{path}\n" for path in pictures))


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
