"""What the mixers keep of each sequence during generation, and how they go on from it.

A cache has one slot per sequence; the sequences in use lie in the first slots, so that a step of
decoding reads views. Softmax layers keep rotated keys and values in the dtype of the model,
lightning layers one fp32 (fp64) state per head. Caches are allocated by the first row that fills
them, and those of keys and values grow by doubling.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from ring_train.model.documents import Decoding, Documents
from ring_train.ops.attention import cached_attention, document_attention
from ring_train.ops.lightning import lightning_attention, lightning_attention_step


class Cache(Protocol):
    """What one layer keeps of the sequences."""

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy the slots `sources` [m] over the slots `targets` [m]; int64."""
        ...


@runtime_checkable
class CachedMixer(Protocol):
    """A token mixer that can go on from a cache, by `documents.decoding`."""

    def build_cache(self, num_slots: int) -> Cache:
        """Return an empty cache for this layer."""
        ...


class KeyValueCache:
    """Keys and values of the sequences of one softmax layer.

    Args:
        num_slots: sequences at a time.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.keys = torch.empty(0)  # [slots, tokens, g/tp, d] once allocated
        self.values = torch.empty(0)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        documents: Documents,
        scale: float,
    ) -> torch.Tensor:
        """Return [t, n/tp, d] from query [t, n/tp, d] and key, value [t, g/tp, d]; keep both."""
        decoding = documents.decoding
        assert decoding is not None
        n = decoding.num_sequences
        self._reserve(key, 1 + max(decoding.longest, max(documents.lengths, default=0)))
        outputs = []
        if n:
            own = torch.arange(n, device=key.device)
            self.keys[own, decoding.lengths] = key[:n]
            self.values[own, decoding.lengths] = value[:n]
            tokens = decoding.longest + 1
            outputs.append(
                cached_attention(
                    query[:n],
                    self.keys[:n, :tokens],
                    self.values[:n, :tokens],
                    lengths=decoding.lengths + 1,
                    scale=scale,
                )
            )
        if documents.lengths:
            query, key, value = query[n:], key[n:], value[n:]
            outputs.append(
                document_attention(
                    query,
                    key,
                    value,
                    cu_seqlens=documents.cu_seqlens_q,
                    lengths=documents.lengths,
                    scale=scale,
                )
            )
            self._admit(key, value, decoding)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """See Cache."""
        self.keys[targets] = self.keys[sources]
        self.values[targets] = self.values[sources]

    def _admit(self, key: torch.Tensor, value: torch.Tensor, decoding: Decoding) -> None:
        admission = decoding.admission
        if admission is not None:
            # What the slots held is gone: 0 behind the end of a sequence, never inf or NaN.
            end = admission.first_slot + len(admission.sources)
            self.keys[admission.first_slot : end] = 0
            self.values[admission.first_slot : end] = 0
            self.keys[admission.slots, admission.positions] = key[admission.tokens]
            self.values[admission.slots, admission.positions] = value[admission.tokens]

    def _reserve(self, like: torch.Tensor, num_tokens: int) -> None:
        """Have room for sequences of so many tokens; what is new is zero, never NaN."""
        room = self.keys.shape[1] if self.keys.dim() > 1 else 0
        if num_tokens <= room:
            return
        shape = self.num_slots, max(num_tokens, 2 * room), *like.shape[1:]
        keys, values = like.new_zeros(shape), like.new_zeros(shape)
        if room:
            keys[:, :room], values[:, :room] = self.keys, self.values
        self.keys, self.values = keys, values


class StateCache:
    """Recurrent states of the sequences of one lightning layer.

    Args:
        num_slots: sequences at a time.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.states = torch.empty(0)  # [slots, n/tp, d, dv] fp32 once allocated

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        slopes: torch.Tensor,
        *,
        documents: Documents,
    ) -> torch.Tensor:
        """Return [t, n/tp, d] from query, key and value of that shape; keep the states."""
        decoding = documents.decoding
        assert decoding is not None
        n, admission = decoding.num_sequences, decoding.admission
        outputs = []
        if n:
            outputs.append(
                lightning_attention_step(query[:n], key[:n], value[:n], slopes, self.states[:n])
            )
        if documents.lengths:
            output, states = lightning_attention(
                query[n:],
                key[n:],
                value[n:],
                slopes,
                cu_seqlens=documents.cu_seqlens_q,
                lengths=documents.lengths,
                output_final_state=admission is not None,
            )
            outputs.append(output)
            if admission is not None and states is not None:
                if not self.states.numel():
                    self.states = states.new_zeros(self.num_slots, *states.shape[1:])
                end = admission.first_slot + len(admission.sources)
                self.states[admission.first_slot : end] = states[admission.sources]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """See Cache."""
        self.states[targets] = self.states[sources]
