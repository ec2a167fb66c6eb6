"""Words, and hashes of words, for the rules of datatrove without its optional packages."""

import regex
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WhitespaceTokenizer, WordTokenizer, load_word_tokenizer

from data_pipeline.config import PipelineError
from data_pipeline.curation.nodes import WORDS

LETTER = r"[\p{L}\p{M}\p{N}_]"
WORD = regex.compile(rf"{LETTER}+(?:['\u2019.]{LETTER}+)*|([^\p{{L}}\p{{M}}\p{{N}}_\s])\1*")
"""Letters and digits, an apostrophe or dot inside them included; or a run of another character."""
HASH_CONFIG = HashConfig(precision=64, hash_fc="sha1")
"""datatrove's default, xxhash, is called with str, which xxhash 4 refuses."""


class PlainWords(WhitespaceTokenizer):
    """Words by one regular expression, sentences by datatrove's; for scripts that write spaces."""

    def word_tokenize(self, text: str) -> list[str]:
        """Return the words and punctuation marks of a text."""
        return [match.group() for match in WORD.finditer(text)]


PLAIN_WORDS = PlainWords()
"""One object, because datatrove caches by it."""


def word_tokenizer(language: str) -> WordTokenizer:
    """Return what splits words in a language: WORDS, or datatrove's choice for a code like `en`.

    Raises:
        PipelineError: datatrove knows no such language, or the package it uses is not installed.
    """
    if language == WORDS:
        return PLAIN_WORDS
    try:
        return load_word_tokenizer(language)
    except (ValueError, ImportError) as error:
        raise PipelineError(
            f"language={language}: {error} language={WORDS} needs no package"
        ) from None
