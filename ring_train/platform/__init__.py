"""Makes megatron-core run where there is no CUDA. Import this before anything of megatron.

Unusual: importing it imports megatron.core and replaces a few functions of torch.cuda and of
megatron-core for the life of the process (see `cpu.py`; where CUDA is available, none of them).
"""

import warnings

# Both come at every import of a part of megatron-core that nothing here uses.
warnings.filterwarnings("ignore", message="Apex is not installed")
warnings.filterwarnings("ignore", message="MimoModelConfig is experimental")

from ring_train.platform.cpu import install, native_calls  # noqa: E402  (after the filters)

IS_CPU = install()
"""True where this process has no CUDA device and runs megatron-core on the CPU and gloo."""

__all__ = ["IS_CPU", "native_calls"]
