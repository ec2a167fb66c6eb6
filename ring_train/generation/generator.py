"""Continuous batching over the model chunks of a training layout.

Each data-parallel and each context-parallel rank (with its tensor- and pipeline-parallel ranks) is
one replica that works on sequences of its own; a context-parallel replica holds whole rows. A step
is one row through all stages: one token of every sequence in a slot, and prompts that were waiting.
Where experts are shared between replicas, all of them step together; one without work runs a row
of padding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel

from ring_train.errors import UserError
from ring_train.generation.answers import Answer, gather_answers
from ring_train.generation.rows import Row, make_row
from ring_train.generation.sampling import Sampling, check_request
from ring_train.generation.slots import Slots, deal
from ring_train.generation.stages import broadcast_from_sampler, is_sampler, run_stages
from ring_train.model.decoding import CachedMixer
from ring_train.model.language_model import HybridLanguageModel
from ring_train.ops.sampling import (
    choose_tokens,
    entropies_of,
    next_token_logprobs,
    position_uniforms,
)
from ring_train.plan import Plan, context_tokens
from ring_train.platform import native_calls
from ring_train.runtime.distributed import Groups


class Generator:
    """Writes answers with the model as it is: weights, position embedding and layout of training.

    The caller makes the parameters current: under `parallel.overlap_param_gather` they are not
    after an optimizer step (`ring_train.train.optimizer.gather_parameters`).

    Args:
        plan: the plan of the model.
        model: its chunks on this rank.
        groups: process groups.
        max_batch_size: the most sequences at a time on each replica.
        max_prefill_tokens: the most prompt tokens of a row; a longer prompt goes alone.

    Raises:
        UserError: a size is below 1, or a token mixer of the model has no cache.
    """

    def __init__(
        self,
        plan: Plan,
        model: list[DistributedDataParallel],
        groups: Groups,
        *,
        max_batch_size: int,
        max_prefill_tokens: int,
    ) -> None:
        for name, size in (
            ("max_batch_size", max_batch_size),
            ("max_prefill_tokens", max_prefill_tokens),
        ):
            if size < 1:
                raise UserError(f"{name}={size} leaves room for nothing; set 1 or more")
        self.plan, self.model, self.groups = plan, model, groups
        self.max_batch_size, self.max_prefill_tokens = max_batch_size, max_prefill_tokens
        self.mixers = _cached_mixers(model)
        self.row_multiple = plan.mesh.tp if plan.mesh.sequence_parallel else 1
        shared = torch.distributed.get_process_group_ranks(groups.collection.tp_ep)
        own = torch.distributed.get_process_group_ranks(groups.collection.tp)
        self.steps_together = not set(shared) <= set(own)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, num_samples: int = 1
    ) -> list[Answer]:
        """Return the answers ordered by (prompt, sample) on every rank.

        Collective over all ranks; every rank passes all prompts. The model is in eval mode
        meanwhile. Weights, router counters and random states are not touched.

        Args:
            prompts: token ids, at least one each.
            sampling: how tokens are chosen and when an answer ends.
            num_samples: answers to each prompt.

        Raises:
            UserError: on every rank; before anything runs, or because logits are not finite.
        """
        chunk = self.model[0].module
        assert isinstance(chunk, HybridLanguageModel)
        context = context_tokens(self.plan.config.model, chunk.rotary_scaling_factor)
        check_request(
            prompts,
            sampling,
            num_samples,
            vocab_size=self.plan.config.model.vocab_size,
            context=context,
        )
        group = self.groups.collection.dp_cp
        slots = Slots(
            prompts,
            deal(len(prompts), num_samples, group.size(), group.rank()),
            num_samples=num_samples,
            sampling=sampling,
            context=context,
            max_batch_size=self.max_batch_size,
            max_prefill_tokens=self.max_prefill_tokens,
        )
        with _evaluating(self.model), native_calls():
            self._run(slots, sampling)
        return gather_answers(slots.finished(), num_samples, group)

    def _run(self, slots: Slots, sampling: Sampling) -> None:
        """Step until every sequence has ended. Collective as the model's forward."""
        caches = {
            number: mixer.build_cache(slots.num_slots) for number, mixer in self.mixers.items()
        }
        while self._is_busy(slots):
            step = slots.next_step(self.row_multiple)
            row = make_row(step, caches, self.groups.device)
            hidden = run_stages(self.model, self.groups, row)
            values = self._next_tokens(hidden, row, slots, sampling)
            if not slots.n:
                continue
            moved = slots.take(values)
            if moved is not None:
                sources, targets = (torch.from_numpy(x).to(self.groups.device) for x in moved)
                for cache in caches.values():
                    cache.move(sources, targets)

    def _is_busy(self, slots: Slots) -> bool:
        """Return whether this replica, or one that shares experts with it, has work left.

        No replica has, once logits of one that steps with it are not finite.
        """
        if not self.steps_together:
            return slots.is_busy
        flags = [int(slots.is_busy), int(slots.not_finite is not None)]
        state = torch.tensor(flags, device=self.groups.device)
        torch.distributed.all_reduce(
            state, op=torch.distributed.ReduceOp.MAX, group=self.groups.collection.dp_cp
        )
        is_busy, has_failed = state.tolist()
        return bool(is_busy) and not has_failed

    def _next_tokens(
        self, hidden: torch.Tensor | None, row: Row, slots: Slots, sampling: Sampling
    ) -> np.ndarray:
        """Return [3, n] tokens, log-probabilities and entropies, on every rank of the replica.

        Collective over the replica.
        """
        values = torch.empty(3, slots.n, dtype=torch.float64, device=self.groups.device)
        if hidden is not None and slots.n:
            chunk = self.model[-1].module
            assert isinstance(chunk, HybridLanguageModel)
            logits = chunk.next_token_logits(hidden, row.outputs)
            if is_sampler(self.groups):
                values = _sample(logits, slots, sampling)
        if slots.n:
            broadcast_from_sampler(values, self.groups)
        return values.cpu().numpy()


def _sample(logits: torch.Tensor, slots: Slots, sampling: Sampling) -> torch.Tensor:
    """Return [3, n] fp64: the chosen tokens, their log-probabilities, the entropies.

    The log-probability is NaN where a logit is not finite: that is how all ranks learn of it.
    """
    logprobs = next_token_logprobs(logits)
    uniforms = position_uniforms(
        sampling.seed,
        slots.sequences // slots.num_samples,
        slots.sequences % slots.num_samples,
        slots.written,
    )
    tokens = choose_tokens(
        logprobs,
        torch.from_numpy(uniforms).to(logits.device),
        temperature=float(sampling.temperature),
        top_k=sampling.top_k,
        top_p=float(sampling.top_p),
    )
    chosen = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    chosen.masked_fill_(~logits.isfinite().all(-1), torch.nan)
    return torch.stack([tokens.double(), chosen.double(), entropies_of(logprobs).double()])


def _cached_mixers(model: Sequence[DistributedDataParallel]) -> dict[int, CachedMixer]:
    """Return {layer number: token mixer} of the layers on this rank."""
    mixers: dict[int, CachedMixer] = {}
    for chunk in model:
        assert isinstance(chunk.module, HybridLanguageModel)
        layers: Any = chunk.module.decoder.layers
        for layer in layers:
            mixer = layer.self_attention
            if not isinstance(mixer, CachedMixer):
                raise UserError(
                    f"layer {layer.layer_number} mixes tokens by {type(mixer).__name__}, which has "
                    "no build_cache and cannot go on from one token to the next; give it one as "
                    "ring_train.model.decoding has them, or choose other model.token_mixers"
                )
            mixers[layer.layer_number] = mixer
    return mixers


@contextlib.contextmanager
def _evaluating(model: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """The chunks are in eval mode inside this context, and as they were after it."""
    were_training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, was_training in zip(model, were_training, strict=True):
            chunk.train(was_training)
