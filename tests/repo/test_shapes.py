"""The jaxtyping hook of tests/conftest.py is on: shapes in signatures of ring_train.ops count."""

import jaxtyping
import pytest
import torch


def test_a_misshapen_tensor_is_refused_by_its_signature() -> None:
    from ring_train.ops.norm import rms_norm

    with pytest.raises(jaxtyping.TypeCheckError, match="rms_norm"):
        rms_norm(torch.ones(2, 4), torch.ones(4, 1), 1e-6)
