"""The index of evaluation n-grams, and datatrove's filter over it.

datatrove's own indexer imports lighteval and downloads its tasks; this one reads local JSONL and
writes the same files: NAME.index.hashes, 64-bit hashes of the n-grams.
"""

import glob
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.utils.text import TextNormConfig, ngrams, simplify_text

from data_pipeline.config import PipelineError
from data_pipeline.curation.nodes import Decontaminate
from data_pipeline.curation.words import HASH_CONFIG, word_tokenizer

logger = logging.getLogger(__name__)


class ContaminationFilter(NGramsDecontFilter):
    """datatrove's filter, configured by a step."""

    def __init__(self, folder: Path, step: Decontaminate) -> None:
        super().__init__(
            str(folder),
            NGramsDecontConfig(
                n_grams=step.n_grams,
                norm_config=TextNormConfig(norm_numbers=step.norm_numbers),
                hash_config=HASH_CONFIG,
            ),
            language=word_tokenizer(step.language),  # type: ignore[arg-type]  # load_word_tokenizer takes both
        )

    def hashes(self, text: str) -> set[int]:
        """Return the hashes of a text's n-grams, as `filter` computes them."""
        words = self.tokenizer.word_tokenize(simplify_text(text, self.config.norm_config))
        return {self.hash_func(" ".join(gram)) for gram in ngrams(words, self.config.n_grams)}


def evaluation_files(step: Decontaminate) -> list[Path]:
    """Return the evaluation files of a step.

    Raises:
        PipelineError: there is none, or two of the same stem.
    """
    paths = [Path(name) for name in sorted(glob.glob(step.evaluation, recursive=True))]
    if not paths:
        raise PipelineError(f"evaluation={step.evaluation} matches no file; quote a glob")
    stems = [path.stem for path in paths]
    for stem in stems:
        if stems.count(stem) > 1:
            raise PipelineError(
                f"evaluation={step.evaluation}: two files are called {stem}; rename one, the name "
                "is the reason of a drop"
            )
    return paths


def build_index(step: Decontaminate, folder: Path) -> None:
    """Write the index of the step's evaluation files.

    Raises:
        PipelineError: a line is no object with text, or every item of a file is too short.
    """
    folder.mkdir(parents=True, exist_ok=True)
    block = ContaminationFilter(folder, step)
    for path in evaluation_files(step):
        hashes: set[int] = set()
        num_items = num_short = 0
        for text in _item_texts(path, step.fields):
            found = block.hashes(text)
            hashes |= found
            num_items += 1
            num_short += not found
        if not hashes:
            raise PipelineError(
                f"{path}: none of {num_items} items has {step.n_grams} words; lower n_grams"
            )
        if num_short:
            logger.warning(
                "%s: %d of %d items have fewer than %d words and cannot be found",
                *(path, num_short, num_items, step.n_grams),
            )
        dtype = np.dtype(block.config.hash_config.np_descr)
        np.array(sorted(hashes), dtype=dtype).tofile(folder / f"{path.stem}.index.hashes")


def _item_texts(path: Path, fields: list[str]) -> Iterator[str]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{path}:{number}"
            try:
                item = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise PipelineError(
                    f"{where} is not JSON ({error}); one object a line is expected"
                ) from None
            if not isinstance(item, dict):
                raise PipelineError(f"{where} is a {type(item).__name__}; an object is expected")
            missing = [name for name in fields if not isinstance(item.get(name), str)]
            if missing:
                raise PipelineError(
                    f"{where}: {missing[0]!r} is no string; the item has {', '.join(item)}"
                )
            names = fields or [name for name in item if name not in ("id", "domain")]
            texts = [item[name] for name in names if isinstance(item[name], str)]
            if not texts:
                raise PipelineError(f"{where} has no string to look for; name fields=[...]")
            yield "\n".join(texts)
