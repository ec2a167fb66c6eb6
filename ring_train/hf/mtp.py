"""MTP layers in a folder of their own: `mtp/` inside the folder of the model.

It is a model of one layer without embedding and head, as the released exporter writes it
(inclusionAI/Ling-V2 @ af8837e, tools/convert_dcp_to_safetensors.py `--mtp-path`); depth k is layer
k there, and layer L + k where it lies behind the L layers of the trunk.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from ring_train.config import MtpExport
from ring_train.hf.fp8 import quantization_dict
from ring_train.hf.table import Entry

MTP_FOLDER = "mtp"
LOGICAL_PREFIX = "mtp."
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def trunk_table(table: dict[str, Entry]) -> dict[str, Entry]:
    """Return the entries of a table that belong to no MTP layer."""
    return {name: e for name, e in table.items() if not name.startswith(LOGICAL_PREFIX)}


def mtp_table(table: dict[str, Entry], num_layers: int) -> dict[str, Entry]:
    """Return the entries of MTP layers, under their names in a folder of their own."""
    return {
        name: dataclasses.replace(e, hf=tuple(moved(hf, -num_layers) for hf in e.hf))
        for name, e in table.items()
        if name.startswith(LOGICAL_PREFIX)
    }


def moved(hf_name: str, num_layers: int) -> str:
    """Return the name of a tensor whose layer is so many further on."""
    return LAYER.sub(lambda found: f"model.layers.{int(found[1]) + num_layers}.", hf_name)


def mtp_place(folder: Path) -> MtpExport:
    """Return where a folder has its MTP layers, if it has any."""
    return MtpExport.separate if (folder / MTP_FOLDER).is_dir() else MtpExport.layer


def mtp_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config.json` of the folder of MTP layers, given that of the model with them.

    MTP layers have softmax attention in hybrid models too, hence groups of one layer.
    """
    changed: dict[str, Any] = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    if "layer_group_size" in config:
        changed["layer_group_size"] = 1
    if "quantization_config" in config:
        changed["quantization_config"] = quantization_dict(0, config["num_nextn_predict_layers"])
    return {**config, **changed}
