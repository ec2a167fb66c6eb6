"""Makes vLLM generate tokens that are given, so that its decoding can be scored."""

from collections.abc import Callable

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED_TOKENS = "ring_linear_forced_tokens"
"""Key of SamplingParams.extra_args: the ids that a request must generate."""


class ForcedTokens(AdapterLogitsProcessor):
    """Lets requests with FORCED_TOKENS choose only the next of them; others are left alone."""

    def is_argmax_invariant(self) -> bool:
        """Return False: the best token is another one afterwards."""
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], Tensor], Tensor] | None:
        """Return what forces the tokens of one request, if it asks for that."""
        forced = (params.extra_args or {}).get(FORCED_TOKENS)
        if forced is None:
            return None

        def force(generated: list[int], logits: Tensor) -> Tensor:
            token = forced[len(generated)]
            kept = logits[token].clone()
            return torch.full_like(logits, -torch.inf).index_fill_(
                0, torch.tensor(token, device=logits.device), kept.item()
            )

        return force
