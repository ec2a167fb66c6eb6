"""What cannot be generated is refused before anything runs, with the way out."""

from typing import Any

import pytest

from ring_train.errors import UserError
from ring_train.generation.sampling import Sampling, check_request

GOOD: dict[str, Any] = {"max_new_tokens": 4, "stop_tokens": (1,)}


def check(prompts: list[list[int]], num_samples: int = 1, **changes: Any) -> None:
    check_request(prompts, Sampling(**(GOOD | changes)), num_samples, vocab_size=10, context=6)


def test_a_good_request_passes() -> None:
    check([[1], [9] * 5], temperature=0, top_k=1, top_p=1)
    check([], seed=2**63 - 1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is less than .*; set 1 or more"),
        ({"temperature": -0.1}, "temperature=-0.1 is negative; set 0"),
        ({"temperature": float("nan")}, "temperature=nan is not finite; set 0"),
        ({"temperature": float("inf")}, "temperature=inf is not finite; set 0"),
        ({"top_p": 0.0}, "top_p=0.0 .*; set it above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": float("nan")}, "top_p=nan .*; set it above 0 and at most 1"),
        ({"top_p": float("inf")}, "top_p=inf .*; set it above 0 and at most 1"),
        ({"seed": -1}, r"seed=-1 is outside 0 <= seed < 2\*\*63; choose"),
        ({"seed": 2**63}, "seed=9223372036854775808 is outside"),
        ({"top_k": 0}, "top_k=0 keeps no token; set 1 or more, or None"),
        ({"num_samples": 0}, "num_samples=0 asks for no answer"),
        ({"stop_tokens": (10,)}, "not all below vocab_size=10"),
    ],
)
def test_a_wrong_setting_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        check([[1]], **changes)


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([], "prompt 1 is empty; give each at least one token"),
        ([3, 10], "prompt 1 has token 10, which is outside vocab_size=10; tokenise"),
        ([-1, 3], "prompt 1 has token -1"),
        ([1] * 6, "prompt 1 has 6 tokens, .* context of 6; shorten it to 5 or less"),
    ],
)
def test_a_wrong_prompt_is_named(prompt: list[int], match: str) -> None:
    with pytest.raises(UserError, match=match):
        check([[1], prompt])
