"""What an evaluation records is JSON, whatever the weights have become."""

import json
import math

from ring_train.train.answers import EvaluationResult


def test_a_figure_that_is_no_number_is_null() -> None:
    figures = {"accuracy": 0.5, "entropy_nats": math.nan, "entropy_nats/math": math.inf}
    result = EvaluationResult(figures=figures, answers=[], digest="abc", temperature=0.0)
    assert json.loads(json.dumps(result.record(), allow_nan=False)) == {
        **{"digest": "abc", "temperature": 0.0},
        **{"accuracy": 0.5, "entropy_nats": None, "entropy_nats/math": None},
    }
