"""Score given token ids: `python -m ring_train.jobs.score hf_dir=DIR prompts=FILE output=FILE`.

Imports a Hugging Face folder into the trainer's own model under the given layout (alone or under
torchrun) and writes log-probabilities per token; `grad_norms=FILE` adds losses and gradient norms.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from ring_train.config import ScoreConfig, compose
from ring_train.hf.config import read_model_config
from ring_train.jobs.forward_config import forward_config, world_size
from ring_train.jobs.prompt_file import read_prompts
from ring_train.jobs.results import write_json
from ring_train.plan import Plan, make_plan
from ring_train.runtime.errors import run_job


def main(overrides: list[str]) -> None:
    """Score the prompts that the overrides name."""
    config = compose("score", overrides)
    model = read_model_config(config.hf_dir, config.decay_layer_rule)
    prompts = read_prompts(Path(config.prompts), model.vocab_size)
    model = dataclasses.replace(
        model, moe_z_loss_coeff=0.0, moe_aux_loss_coeff=0.0, moe_router_bias_update_rate=0.0
    )
    plan = score_plan(config, model, prompts)
    result, gradients = score(plan, config, prompts)
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(config.output, result)
        if config.grad_norms:
            write_json(config.grad_norms, gradients)


def score_plan(config: ScoreConfig, model: Any, prompts: list[list[int]]) -> Plan:
    """Return a plan whose rows hold the longest prompt (all of them if packed)."""
    lengths = [len(prompt) for prompt in prompts]
    base = forward_config(
        model,
        config.parallel,
        precision=config.precision,
        row_tokens=sum(lengths) if config.packed else max(lengths),
        num_rows=1 if config.packed else len(prompts),
    )
    return make_plan(base, world_size())


def score(
    plan: Plan, config: ScoreConfig, prompts: list[list[int]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ({"logprobs", ...}, {"loss", "grad_norms", ...}) of the prompts."""
    import ring_train.platform  # noqa: F401  (heavy imports only after the plan holds)
    from ring_train.hf.table import make_table
    from ring_train.hf.weights import load_hf_weights
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import attach_schedule_callbacks
    from ring_train.train.scoring import gradient_norms, make_rows, score_rows

    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        load_hf_weights(Path(config.hf_dir), plan.config.model, model)
        attach_schedule_callbacks(model, None, groups.collection)
        rows = make_rows(plan, prompts, groups.dp_rank, packed=config.packed)
        result = score_rows(model, rows, prompts, groups, packed=config.packed)
        if not config.grad_norms:
            return result, {}
        table = make_table(plan.config.model)
        depths = plan.layers.num_mtp
        gradients: dict[str, Any] = {}
        for prefix, weights in (
            ("", [1.0] + [0.0] * depths),
            ("mtp_", [0.0] + [1.0 / max(depths, 1)] * depths),
        ):
            if not any(weights):
                continue
            sums, norms = gradient_norms(
                model,
                rows,
                groups.collection,
                loss_weights=weights,
                to_named=lambda name, full: table[name].to_hf(full),
            )
            mean = sums.mtp_means().mean() if prefix else sums.lm_loss
            gradients |= {f"{prefix}loss": float(mean), f"{prefix}grad_norms": norms}
        return result, gradients


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
