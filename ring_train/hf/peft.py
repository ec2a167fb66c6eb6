"""Adapters as a folder that PEFT loads beside the folder of the frozen weights.

Format: adapter_config.json and adapter_model.safetensors, with names
`base_model.model.MODULE.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]
(https://github.com/huggingface/peft, docs/source/developer_guides/checkpoint.md).

Unusual: the trainer stacks gate and up projection. They share one A, which is written for both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ring_train.config import LoraConfig, ModelConfig, WeightFormat
from ring_train.hf.adapters import Adapter
from ring_train.hf.errors import HfError
from ring_train.hf.parts import DTYPES
from ring_train.hf.reader import open_hf_folder
from ring_train.hf.table import Entry, make_table
from ring_train.hf.transaction import write_folder
from ring_train.hf.writer import write_json
from ring_train.storage.safetensors import write_tensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def write_peft_folder(
    output: str | Path,
    model: ModelConfig,
    lora: LoraConfig,
    adapters: dict[str, Adapter],
    *,
    precision: WeightFormat,
    base_model: str,
) -> None:
    """Write the folder of all adapters of a model; it appears whole or not at all.

    Args:
        output: must not exist, or be empty.
        model: whose table names the modules.
        lora: rank, alpha and targets.
        adapters: whole, by the name of the weight that they belong to.
        precision: of the written matrices.
        base_model: folder of the frozen weights, as it shall stand in the config.

    Raises:
        HfError: with nothing left behind and `output` as it was.
    """
    table, dtype = make_table(model), DTYPES[precision]
    modules: set[str] = set()
    tensors: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        for hf_name, (a, b) in _hf_adapters(table[name], adapter).items():
            module = hf_name.removesuffix(".weight")
            modules.add(module)
            for key, matrix in (("lora_A", a), ("lora_B", b)):
                # A copy: safetensors refuses views that share storage.
                stored = matrix.detach().to("cpu", dtype, copy=True).contiguous()
                tensors[f"base_model.model.{module}.{key}.weight"] = stored
    pattern = target_pattern(modules)
    every_module = {name.removesuffix(".weight") for entry in table.values() for name in entry.hf}
    assert {module for module in every_module if re.fullmatch(pattern, module)} == modules

    def fill(partial: Path) -> None:
        write_json(partial / CONFIG_NAME, _peft_config(lora, pattern, base_model))
        write_tensors(partial / WEIGHTS_NAME, tensors)
        with safe_open(partial / WEIGHTS_NAME, framework="pt") as written:
            assert set(written.keys()) == tensors.keys()

    write_folder(Path(output), fill)


def _hf_adapters(entry: Entry, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Return {name of a weight in the folder: (A, B)} of the adapter of one of our weights."""
    rank = adapter.a.shape[0]
    rows = dataclasses.replace(entry, hf_shapes=tuple((n, rank) for n, _ in entry.hf_shapes))
    return {name: (adapter.a, b) for name, b in rows.to_hf(adapter.b).items()}


def target_pattern(modules: Iterable[str]) -> str:
    """Return the regular expression of exactly these modules; of experts it means all.

    Layers are named one by one: the folder of the weights may hold MTP layers that the run left
    out.
    """
    layers: dict[str, set[int]] = {}
    for module in modules:
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        assert found, module
        kind = re.sub(r"(^|\.)\d+(?=\.)", r"\1\\d+", found[2]).replace(".", r"\.")
        layers.setdefault(kind, set()).add(int(found[1]))
    kinds: dict[str, list[str]] = {}
    for kind, numbers in sorted(layers.items()):
        kinds.setdefault("|".join(map(str, sorted(numbers))), []).append(kind)
    groups = [rf"({numbers})\.({'|'.join(found)})" for numbers, found in kinds.items()]
    return rf"model\.layers\.({'|'.join(groups)})"


def _peft_config(lora: LoraConfig, pattern: str, base_model: str) -> dict[str, Any]:
    """Return adapter_config.json."""
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": pattern,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
    }


def check_base_weights(
    folder: Path,
    model: ModelConfig,
    names: Iterable[str],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> None:
    """Raise HfError unless a folder holds the frozen weights of a run, rounded or not.

    Args:
        folder: Hugging Face folder.
        model: what `read_model_config` said about it.
        names: of the weights in the trainer.
        read: returns a weight of the run, whole.
        dtype: in which the run held what is not fp32 by definition.
    """
    with open_hf_folder(folder, model) as reader:
        for name in names:
            theirs, ours = reader.read_logical(name), read(name)
            dtypes = (theirs.dtype, theirs.dtype if reader.table[name].fp32 else dtype)
            narrow = min(dtypes, key=lambda dtype: dtype.itemsize)
            if not theirs.to(narrow).equal(ours.detach().to("cpu", narrow)):
                raise HfError(
                    f"base_model={folder}: {name} differs from the weight that the adapters were "
                    "trained beside; name the folder that the run started from, or its export"
                )
