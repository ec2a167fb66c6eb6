"""Train a byte-level BPE tokenizer: `python -m data_pipeline.train_tokenizer`.

The split rule is the family's: digits stand alone, a word takes one character before it. The folder
loads with `transformers.AutoTokenizer`. Special tokens have the last ids.
"""

import dataclasses
import logging
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.config import PipelineError, run_command
from data_pipeline.documents import write_json
from data_pipeline.sources import SourceOptions, find_inputs, read_source
from data_pipeline.special_tokens import BOS, CHAT_TEMPLATE, CONTROL_TOKENS, EOS, TEXT_TOKENS

logger = logging.getLogger(__name__)

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Split rule of the bailing tokenizers."""
MODEL_MAX_LENGTH_TOKENS = 131_072


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Arguments."""

    input: str
    """Files, quoted globs, folders or hf:NAME, separated by commas."""
    output: str
    """Folder of the tokenizer."""
    vocab_size: int = 4096
    """Number of ids, special tokens included."""
    sample_bytes: int = 8_000_000
    """About so much text is read, chosen by the hash of the document id."""
    text_key: str = "text"


def main() -> int:
    """Train the tokenizer and return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_command(TrainTokenizer, train_tokenizer)


def train_tokenizer(arguments: TrainTokenizer) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Raises:
        PipelineError: the vocabulary is too small for bytes and special tokens, or the text too
            small for the vocabulary.
    """
    num_special = len(CONTROL_TOKENS) + len(TEXT_TOKENS)
    if arguments.vocab_size < 256 + num_special:
        raise PipelineError(
            f"vocab_size={arguments.vocab_size} cannot hold 256 bytes and {num_special} special "
            f"tokens; choose at least {256 + num_special}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size - num_special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(arguments), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in TEXT_TOKENS])
    if tokenizer.get_vocab_size() != arguments.vocab_size:
        raise PipelineError(
            f"vocab_size={arguments.vocab_size} is more than the {tokenizer.get_vocab_size()} "
            f"entries that {arguments.input} supports; give more text or a smaller vocabulary"
        )
    _write_folder(tokenizer, Path(arguments.output))
    logger.info("%s: %d entries", arguments.output, arguments.vocab_size)


def _sample(arguments: TrainTokenizer) -> Iterator[str]:
    """Yield the texts of a fixed subset of the documents, the same fraction of every input."""
    num_bytes = sum(source.num_bytes for source in find_inputs(arguments.input))
    fraction = arguments.sample_bytes / max(1, num_bytes)
    for document in read_source(arguments.input, SourceOptions(text_key=arguments.text_key)):
        if zlib.crc32(document.id.encode()) < fraction * 2**32:
            yield document.text


def _write_folder(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_MAX_LENGTH_TOKENS,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)
    partial = folder / "tokenizer.json.partial"
    tokenizer.save(str(partial))
    os.replace(partial, folder / "tokenizer.json")


if __name__ == "__main__":
    sys.exit(main())
