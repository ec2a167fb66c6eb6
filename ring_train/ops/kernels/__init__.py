"""Triton kernels and the functions that launch them: tensors in, new tensors out.

No autograd and no checks of what a user passed: that is the work of the ops that call them. With
TRITON_INTERPRET=1 in the environment before the first import they run on CPU tensors, for tests;
the interpreter computes wrong values in bfloat16, silently.
"""

import ring_train.ops.kernels.launching  # noqa: F401  (makes the interpreter count)
