"""Triton kernels run in Triton's interpreter here, on the CPU."""

import os

# Read when the kernels are imported, which only tests of this folder do.
os.environ["TRITON_INTERPRET"] = "1"
