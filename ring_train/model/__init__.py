"""The hybrid language model on megatron-core: mixers, layer specs, pipeline chunks."""

import ring_train.platform  # noqa: F401  (must come before the first import of megatron.core)
