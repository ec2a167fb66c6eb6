"""The training step, its optimizer and schedule, the loop, metrics and evaluation."""

import ring_train.platform  # noqa: F401  (must come before the first import of megatron.core)
