"""Which sequences share a row: none lost, none twice, no gap between slots."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_train.generation.sampling import Sampling
from ring_train.generation.slots import Slots, deal

STOP = 9


def make_slots(lengths: list[int], num_samples: int = 1, **limits: int) -> Slots:
    prompts = [[prompt] * length for prompt, length in enumerate(lengths)]
    sizes = {"max_batch_size": 4, "max_prefill_tokens": 10, "context": 50} | limits
    return Slots(
        prompts,
        range(len(prompts) * num_samples),
        num_samples=num_samples,
        sampling=Sampling(max_new_tokens=sizes.pop("max_new_tokens", 5), stop_tokens=(STOP,)),
        **sizes,
    )


def take(slots: Slots, tokens: list[int]) -> tuple[list[int], list[int]] | None:
    values = np.zeros((3, len(tokens)))
    values[0] = tokens
    moved = slots.take(values)
    return None if moved is None else (moved[0].tolist(), moved[1].tolist())


def test_a_row_holds_a_token_of_each_sequence_then_prompts_then_padding() -> None:
    slots = make_slots([3, 2, 4], max_batch_size=2)
    first = slots.next_step(4)
    assert first.tokens.tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert first.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert first.documents == (3, 2, 3)
    assert first.outputs.tolist() == [2, 4]
    assert take(slots, [5, STOP]) is None
    second = slots.next_step(4)
    assert second.tokens.tolist() == [5, 2, 2, 2, 2, 0, 0, 0]
    assert second.position_ids.tolist() == [3, 0, 1, 2, 3, 0, 1, 2]
    assert second.lengths.tolist() == [3]
    assert second.outputs.tolist() == [0, 4]
    assert second.num_padding == 3


def test_samples_admitted_together_share_a_prompt() -> None:
    slots = make_slots([3, 2], num_samples=3, max_batch_size=5)
    step = slots.next_step(1)
    assert step.documents == (3, 2)
    assert step.sources.tolist() == [0, 0, 0, 1, 1]
    assert step.outputs.tolist() == [2, 2, 2, 4, 4]
    take(slots, [STOP] * 5)
    assert slots.next_step(1).documents == (2,)


def test_prompts_beyond_the_limit_wait_and_a_longer_one_goes_alone() -> None:
    slots = make_slots([4, 4, 4, 30, 1], max_batch_size=9)
    documents = []
    for _ in range(4):
        documents.append(slots.next_step(1).documents)
        take(slots, [1] * slots.n)
    assert documents == [(4, 4), (4,), (30,), (1,)]


def test_the_last_sequences_fill_the_gaps() -> None:
    slots = make_slots([1, 1, 1, 1])
    slots.next_step(1)
    assert take(slots, [STOP, 4, STOP, 7]) == ([3], [0])
    assert slots.sequences.tolist() == [3, 1]
    assert slots.next_step(1).tokens.tolist() == [7, 4]


def test_an_answer_ends_with_the_context_or_its_limit() -> None:
    slots = make_slots([48, 3], context=50, max_new_tokens=3, max_prefill_tokens=99)
    while slots.is_busy:
        slots.next_step(1)
        take(slots, [1] * slots.n)
    written = slots.finished()
    assert written.lengths.tolist() == [2, 3]
    assert not written.stopped.any()


def test_a_sequence_without_a_next_token_ends_all_work() -> None:
    slots = make_slots([1, 1, 1, 1, 1])
    for _ in range(2):
        assert slots.is_busy
        slots.next_step(1)
        values = np.full((3, 4), 1.0)
        if slots.written[0]:
            values[1, [2, 1]] = np.nan
        assert slots.take(values) is None
    assert not slots.is_busy
    assert slots.finished().not_finite == (1, 1)


def test_nothing_to_do_is_a_row_of_padding() -> None:
    step = make_slots([]).next_step(3)
    assert (step.num_padding, step.documents, len(step.outputs)) == (3, (3,), 0)
    assert make_slots([]).finished().tokens.tolist() == []


@given(
    lengths=st.lists(st.integers(1, 12), max_size=9),
    num_samples=st.integers(1, 3),
    batch=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_every_sequence_gets_its_own_tokens(
    lengths: list[int], num_samples: int, batch: int, seed: int
) -> None:
    slots = make_slots(lengths, num_samples, max_batch_size=batch)
    generator = np.random.default_rng(seed)
    expected: dict[int, list[int]] = {}
    while slots.is_busy:
        step = slots.next_step(2)
        assert len(step.tokens) % 2 == 0
        assert len(step.outputs) == slots.n <= batch
        values = np.stack([generator.integers(0, 10, slots.n) for _ in range(3)]).astype(float)
        for number, token in zip(slots.sequences.tolist(), values[0], strict=True):
            expected.setdefault(number, []).append(int(token))
        slots.take(values)
    written = slots.finished()
    assert written.sequences.tolist() == sorted(expected) == list(range(len(expected)))
    assert len(expected) == len(lengths) * num_samples
    parts = np.split(written.tokens, np.cumsum(written.lengths)[:-1]) if expected else []
    for number, part in enumerate(parts):
        assert part.tolist() == expected[number]
        assert STOP not in expected[number][:-1]
        assert written.stopped[number] == (expected[number][-1] == STOP)
        assert len(expected[number]) <= 5


@pytest.mark.parametrize(("prompts", "samples", "replicas"), [(7, 2, 2), (1, 8, 3), (2, 1, 4)])
def test_replicas_share_the_work_evenly(prompts: int, samples: int, replicas: int) -> None:
    shares = [deal(prompts, samples, replicas, rank) for rank in range(replicas)]
    assert sorted(number for share in shares for number in share) == list(range(prompts * samples))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_list_sorted_by_length_is_dealt_with_a_stride() -> None:
    assert deal(6, 1, 2, 0) == [0, 2, 4]
    assert deal(6, 1, 2, 1) == [1, 3, 5]
