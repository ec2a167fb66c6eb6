"""Text continued by an exported folder, through transformers and the folder's own modeling files.

This runs the Python files of the folder, unless told otherwise only those that are ours.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from ring_train.config import GenerateConfig
from ring_train.hf.config import read_json
from ring_train.hf.errors import HfError
from ring_train.hf.remote_code import check_remote_code


def continue_prompt(config: GenerateConfig) -> str:
    """Return the prompt followed by what the model writes, special tokens left out.

    Runs on the CUDA device in the dtype of the folder if there is one, else on the CPU in fp32;
    block FP8 becomes bf16 there.
    The same seed gives the same text on the same machine.

    Raises:
        HfError: not a folder of a known family with modeling files, or nothing to continue.
    """
    folder = Path(config.hf_dir)
    raw = _read_checked(folder, config)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    has_cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=True,
        use_safetensors=True,
        dtype="auto" if has_cuda or "quantization_config" in raw else torch.float32,
    )
    model = model.to("cuda" if has_cuda else "cpu").eval()
    ids = tokenizer(config.prompt, return_tensors="pt").input_ids.to(model.device)
    if ids.shape[1] == 0:
        raise HfError(f"prompt={config.prompt!r} has no token; give some text to continue")
    torch.manual_seed(config.seed)
    sampling = {"do_sample": False}
    if config.temperature > 0:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p}
        sampling["top_k"] = 0
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=config.max_new_tokens,
        **sampling,
    )
    (text,) = tokenizer.batch_decode(out, skip_special_tokens=True)
    return text


def _read_checked(folder: Path, config: GenerateConfig) -> dict[str, Any]:
    """Return `config.json`; raise for what transformers would report less clearly."""
    raw = read_json(folder / "config.json")
    check_remote_code(folder, raw, trusted=config.trust_remote_code)
    limits = {
        "max_new_tokens must be at least 1": config.max_new_tokens < 1,
        "temperature must not be negative": config.temperature < 0,
        "top_p must be above 0 and at most 1": not 0 < config.top_p <= 1,
    }
    problems = [text for text, is_wrong in limits.items() if is_wrong]
    if problems:
        raise HfError("; ".join(problems))
    return raw
