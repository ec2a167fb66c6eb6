"""Certify an exported folder: `python -m ring_train.jobs.verify_export hf_dir=DIR`.

`[checkpoint=DIR] [mtp=layer|separate|none] [prompts=FILE] [vllm=PYTHON]`. Compares the folder with
the checkpoint that it was exported from, and what transformers (and vLLM) compute from it with what
the trainer computes; writes certificate.json into the folder. Runs the Python files of the folder.
Exits 1 if anything differs. Without a checkpoint the trainer takes its weights from the folder too,
and the certificate says that it shows consistency only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ring_train.config import ModelConfig, MtpExport, VerifyExportConfig, WeightFormat, compose
from ring_train.errors import UserError
from ring_train.jobs.initial_model import is_hf_folder, read_initial_model
from ring_train.jobs.reference_scores import read_rows, score_reference
from ring_train.runtime.errors import run_job

if TYPE_CHECKING:
    import torch

    from ring_train.checkpoint.weights import CheckpointWeights
    from ring_train.hf.certificate.computed import Reference
    from ring_train.hf.certificate.tensors import Read
    from ring_train.hf.certificate.verify import Truth

DIFFERS_STATUS = 1


def main(overrides: list[str]) -> None:
    """Certify the folder that the overrides name."""
    config: VerifyExportConfig = compose("verify_export", overrides)

    from ring_train.hf.certificate.record import CERTIFICATE, write_certificate
    from ring_train.hf.certificate.verify import verify

    folder = Path(config.hf_dir)
    if not is_hf_folder(folder):
        raise UserError(f"hf_dir={folder} has no config.json; name an exported folder")
    truth = read_truth(config)
    check_mtp(folder, truth.model)
    (folder / CERTIFICATE).unlink(missing_ok=True)  # what it says may no longer be so
    certificate = verify(folder, truth, vllm=config.vllm)
    report = certificate.pop("report")
    path = write_certificate(folder, certificate)
    sys.stdout.writelines(report)
    sys.stdout.write(f"{'passed' if certificate['passed'] else 'FAILED'}: {path}\n")
    if not certificate["passed"]:
        sys.exit(DIFFERS_STATUS)


def read_truth(config: VerifyExportConfig) -> Truth:
    """Return what the folder has to mean: the checkpoint, or for want of one the folder itself."""
    from ring_train.hf.certificate.verify import FOLDER_ONLY

    folder = Path(config.hf_dir)
    if config.checkpoint is None:
        source = read_initial_model(str(folder), None, "hf_dir")
        return make_truth(config, source.model, None, folder, FOLDER_ONLY)
    if is_hf_folder(Path(config.checkpoint)):
        raise UserError(
            f"checkpoint={config.checkpoint} is a Hugging Face folder; name the checkpoint or the "
            "run folder that was exported, or leave checkpoint out"
        )
    from ring_train.checkpoint.weights import open_weights
    from ring_train.hf.adapters import adapted_names, read_merged

    source = read_initial_model(config.checkpoint, None, "checkpoint")
    weights = open_weights(source.folder)
    identity = {"checkpoint_step": weights.step, "weights_sha256": weights_digest(weights)}
    lora, model = source.lora, source.model
    scale = 0.0 if lora.rank is None else lora.alpha / lora.rank
    _, adapted = adapted_names(weights.names)
    if config.mtp is MtpExport.none:
        model = dataclasses.replace(model, mtp_num_layers=0)

    def read(name: str) -> torch.Tensor:
        return read_merged(name, weights.read, adapted, scale)

    return make_truth(config, model, read, Path(source.tokenizer), identity)


def make_truth(
    config: VerifyExportConfig,
    model: ModelConfig,
    read: Read | None,
    tokenizer: Path,
    source: str | dict,
) -> Truth:
    """Return the record of what a model has to mean."""
    from ring_train.hf.certificate.conversations import CONVERSATIONS
    from ring_train.hf.certificate.verify import Truth
    from ring_train.hf.mtp import mtp_place
    from ring_train.hf.training_turns import training_turns

    hf_dir = Path(config.hf_dir)
    rows, others = read_rows(config.prompts, hf_dir, model)

    def reference(folder: Path, weights: WeightFormat) -> Reference:
        from ring_train.hf.certificate.tensors import as_exported
        from ring_train.hf.reader import open_hf_folder

        if read is not None:
            return score_reference(model, as_exported(model, weights, read), rows, others)
        with open_hf_folder(folder, model) as reader:
            return score_reference(model, reader.read_logical, rows, others)

    has_own = (tokenizer / "tokenizer.json").is_file()
    # A tokenizer without a chat template is exported with the one of ring_train.
    turns = training_turns(tokenizer, CONVERSATIONS, model.eos_token_id) if has_own else ""
    if isinstance(turns, str):
        turns = training_turns(hf_dir, CONVERSATIONS, model.eos_token_id)
    return Truth(
        source=source,
        model=model,
        mtp=config.mtp if read is not None else mtp_place(hf_dir),
        read=read,
        reference=reference,
        turns=turns,
        end_of_turn=None if isinstance(turns, str) else turns[0].answer_ids[-1],
        tokenizer=tokenizer if has_own and read is not None else None,
    )


def check_mtp(folder: Path, model: ModelConfig) -> None:
    """Raise UserError if a folder that was to have MTP layers was exported without any."""
    from ring_train.hf.config import read_json
    from ring_train.hf.errors import HfError
    from ring_train.hf.mtp import MTP_FOLDER
    from ring_train.hf.shards import read_stored

    if not model.mtp_num_layers or (folder / MTP_FOLDER).exists():
        return
    try:
        says_none = not read_json(folder / "config.json").get("num_nextn_predict_layers", 0)
        stored = read_stored(folder)
    except HfError:
        return  # the certificate names it
    first = model.num_layers
    layers = range(first, first + model.mtp_num_layers)
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)
    if says_none and not any(name.startswith(prefixes) for name in stored):
        raise UserError(
            f"hf_dir={folder} has no MTP layers, the checkpoint has {model.mtp_num_layers}; "
            "add mtp=none if they were left out on purpose, or export again"
        )


def weights_digest(weights: CheckpointWeights) -> str:
    """Return one digest of all weights, whatever layout saved them."""
    from ring_train.hf.certificate.tensors import digest

    lines = [f"{digest(weights.read(name))}  weight/{name}\n" for name in weights.names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
