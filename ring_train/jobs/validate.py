"""Compare weights by held-out loss: `python -m ring_train.jobs.validate weights=[DIR,DIR,...]`.

A DIR is a checkpoint, a run folder (its newest checkpoint) or a Hugging Face folder; models may
differ, the rows do not. The data is that of the first checkpoint, or of `run=DIR`. Alone or under
torchrun, with any `parallel.*`. Prints a table; `output=FILE` receives it as JSON.
"""

import dataclasses
import os
import sys
from pathlib import Path

from ring_train.config import Config, Precision, ValidateConfig, compose, read_yaml
from ring_train.errors import UserError
from ring_train.jobs.forward_config import forward_config, world_size
from ring_train.jobs.initial_model import (
    InitialModel,
    find_weights,
    is_hf_folder,
    read_initial_model,
)
from ring_train.jobs.results import check_writable, write_json
from ring_train.plan import Plan, make_plan
from ring_train.plan.phases import phase_sizes
from ring_train.runtime.errors import run_job


def main(overrides: list[str]) -> None:
    """Validate the weights that the overrides name."""
    config: ValidateConfig = compose("validate", overrides)
    if config.eval_steps is not None and config.eval_steps < 1:
        raise UserError(
            f"eval_steps={config.eval_steps} is not positive; choose 1 or more, or leave it out "
            "for as many as the run has"
        )
    if config.output:
        check_writable("output", config.output)
    sources = [read_initial_model(x, config.decay_layer_rule, "weights") for x in config.weights]
    run = read_run(config, sources)
    plans = [validation_plan(config, run, source) for source in sources]
    losses = [validate(plan, source) for plan, source in zip(plans, sources, strict=True)]
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.write(table(config.weights, losses))
        if config.output:
            rows = [
                {"weights": str(source.folder), **found}
                for source, found in zip(sources, losses, strict=True)
            ]
            write_json(config.output, {"eval_steps": plans[0].config.train.eval_steps, "of": rows})


def read_run(config: ValidateConfig, sources: list[InitialModel]) -> Config:
    """Return the config of the run whose data is read, its indices where that run has them.

    Raises:
        UserError: nothing is given, or nothing that was trained.
    """
    checkpoints = [str(source.folder) for source in sources if source.precision is not None]
    if not sources:
        raise UserError(
            "weights=[] is empty; name checkpoints, run folders or Hugging Face folders"
        )
    if config.run is None and not checkpoints:
        raise UserError(
            f"weights={config.weights} are Hugging Face folders, which name no data; add run=DIR "
            "with the run whose held-out rows to read"
        )
    folder = find_weights(config.run or checkpoints[0], "run")
    if is_hf_folder(folder):
        raise UserError(f"run={folder} is a Hugging Face folder; name a run folder or a checkpoint")
    run: Config = read_yaml(folder / "config.yaml")
    if not any(domain.valid_path for domain in run.data.domains.values()):
        raise UserError(
            f"run={folder}: no domain has a held-out shard (data.domains.NAME.valid_path); name a "
            "run that has"
        )
    index_dir = run.data.index_dir or str(Path(run.run_dir) / "index")
    return dataclasses.replace(run, data=dataclasses.replace(run.data, index_dir=index_dir))


def validation_plan(config: ValidateConfig, run: Config, source: InitialModel) -> Plan:
    """Return the plan that runs the held-out rows of a run through a model.

    Raises:
        UserError: an illegal layout.
    """
    *_, sizes = phase_sizes(run)
    base = forward_config(
        source.model,
        config.parallel,
        precision=config.precision or source.precision or Precision.fp32,
        row_tokens=sizes.seq_length,
    )
    base.train.micro_batch_size = sizes.micro_batch_size
    base.train.global_batch_size *= sizes.micro_batch_size
    base.train.eval_interval_steps = 1
    base.train.eval_steps = run.train.eval_steps if config.eval_steps is None else config.eval_steps
    base = dataclasses.replace(
        base, data=run.data, init_from=str(source.folder), lora=source.lora, seed=run.seed
    )
    return make_plan(base, world_size())


def validate(plan: Plan, source: InitialModel) -> dict[str, float]:
    """Return {domain: nats per token} of the held-out rows."""
    import ring_train.platform  # noqa: F401  (heavy imports only after the plan holds)
    from ring_train.checkpoint.checkpointer import load_weights
    from ring_train.data.loader import build_held_out
    from ring_train.hf.weights import load_hf_weights
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.evaluation import evaluate
    from ring_train.train.optimizer import attach_schedule_callbacks

    with start_runtime(plan) as groups:
        rows = build_held_out(plan)
        model = build_model(plan, groups.collection)
        if source.precision is not None:
            load_weights(source.folder, model, plan, groups.collection)
        else:
            load_hf_weights(source.folder, plan.config.model, model)
        attach_schedule_callbacks(model, None, groups.collection)
        losses = evaluate(model, rows, groups, 0)
        return {key.removeprefix("valid_loss/"): loss for key, loss in losses.items()}


def table(names: list[str], losses: list[dict[str, float]]) -> str:
    """Return a line for each of the weights: the loss of each domain, nats per token."""
    domains = list(losses[0])
    rows = [["nats per token", *domains]]
    rows += [
        [name, *(f"{found[x]:.4f}" for x in domains)]
        for name, found in zip(names, losses, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(
        row[0].ljust(widths[0])
        + "".join(f"  {cell.rjust(width)}" for cell, width in zip(row[1:], widths[1:], strict=True))
        + "\n"
        for row in rows
    )


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
