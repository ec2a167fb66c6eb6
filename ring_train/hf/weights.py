"""From a Hugging Face folder into the trainer's own model, under any layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from ring_train.config import ModelConfig
from ring_train.hf.reader import open_hf_folder
from ring_train.model.lora import is_adapter
from ring_train.model.tensors import local_tensors


@torch.no_grad()
def load_hf_weights(
    folder: Path, model_config: ModelConfig, chunks: Iterable[torch.nn.Module]
) -> None:
    """Copy every tensor that this rank holds out of the folder, cut to its part; not adapters.

    The folder is validated before a tensor is touched; only the tensors of this rank are read.

    Raises:
        HfError: a tensor is missing, extra, misshapen or of a wrong dtype.
    """
    with open_hf_folder(folder, model_config) as reader:
        for item in local_tensors(chunks):
            if not is_adapter(item.name):
                item.tensor.copy_(item.shard.of(reader.read_logical(item.name)))
