"""Pure tensor functions: reference and fast forms. No megatron, no modules, no process groups."""
