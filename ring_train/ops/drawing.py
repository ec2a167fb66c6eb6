"""Random numbers that depend on a seed and a name, never on the order of drawing."""

import hashlib

import torch


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that is the same for the same seed and name, on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
