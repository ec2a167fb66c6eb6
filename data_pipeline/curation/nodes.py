"""The steps that a curation may list, and their parameters: one dataclass each.

Where a field has the name of a parameter of datatrove it is that parameter, with its default.
"""

import dataclasses
import enum

from data_pipeline.config import PipelineError

WORDS = "words"
"""Value of `language`: words are runs of letters and digits; needs no further package."""


class UnicodeForm(enum.Enum):
    """Unicode normalization forms."""

    none = "none"
    NFC = "NFC"
    NFD = "NFD"
    NFKC = "NFKC"
    NFKD = "NFKD"


@dataclasses.dataclass(kw_only=True)
class Step:
    """What every step may say."""

    domains: list[str] = dataclasses.field(default_factory=list)
    """Only documents of these domains are looked at, the others pass; empty for all."""


@dataclasses.dataclass(kw_only=True)
class Normalize(Step):
    """One spelling of the same text: Unicode form, newlines, no control characters."""

    form: UnicodeForm = UnicodeForm.NFC
    newlines: bool = True
    """CR LF, CR, NEL and the Unicode separators become LF."""
    control_characters: bool = True
    """NUL and other control characters are removed; tab and LF stay."""


@dataclasses.dataclass(kw_only=True)
class Ftfy(Step):
    """Repair of text decoded with the wrong encoding. Needs the package ftfy."""


@dataclasses.dataclass(kw_only=True)
class Pii(Step):
    """Addresses of e-mail and of public hosts are replaced."""

    remove_emails: bool = True
    remove_ips: bool = True
    email_replacement: str = "email@example.com"
    ip_replacement: str = "22.214.171.124"


@dataclasses.dataclass(kw_only=True)
class SymbolLines(Step):
    """Lines of nothing but punctuation are removed."""

    replace_char: str = ""


@dataclasses.dataclass(kw_only=True)
class Length(Step):
    """Documents outside of a range of characters are dropped."""

    min_characters: int = 1
    max_characters: int | None = None

    def __post_init__(self) -> None:
        """Refuse an empty range."""
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise PipelineError(
                f"max_characters={self.max_characters} is below "
                f"min_characters={self.min_characters}; nothing would be kept"
            )


@dataclasses.dataclass(kw_only=True)
class Sample(Step):
    """A seeded share of the documents is kept; a function of seed and id alone."""

    fraction: float = 1.0
    by_domain: dict[str, float] = dataclasses.field(default_factory=dict)
    """Fractions of single domains, in place of `fraction`."""
    seed: int = 1234

    def __post_init__(self) -> None:
        """Refuse what is no fraction."""
        for name, value in {"fraction": self.fraction, **self.by_domain}.items():
            if not 0 <= value <= 1:
                raise PipelineError(f"{name}={value} is not between 0 and 1; repeat data by epochs")


@dataclasses.dataclass(kw_only=True)
class Regex(Step):
    """Documents in which a regular expression is found are dropped."""

    regex_exp: str


@dataclasses.dataclass(kw_only=True)
class GopherQuality(Step):
    """Rules of Gopher on words, symbols, bullets and stop words <arXiv 2112.11446>."""

    min_doc_words: int | None = 50
    max_doc_words: int | None = 100000
    min_avg_word_length: int | None = 3
    max_avg_word_length: int | None = 10
    max_symbol_word_ratio: float | None = 0.1
    max_bullet_lines_ratio: float | None = 0.9
    max_ellipsis_lines_ratio: float | None = 0.3
    max_non_alpha_words_ratio: float | None = 0.8
    min_stop_words: int | None = 2
    stop_words: list[str] | None = None
    language: str = WORDS


@dataclasses.dataclass(kw_only=True)
class GopherRepetition(Step):
    """Rules of Gopher on repeated lines, paragraphs and n-grams <arXiv 2112.11446, table A1>."""

    dup_line_frac: float | None = 0.3
    dup_para_frac: float | None = 0.3
    dup_line_char_frac: float | None = 0.2
    dup_para_char_frac: float | None = 0.2
    top_n_grams: dict[int, float] = dataclasses.field(
        default_factory=lambda: {2: 0.2, 3: 0.18, 4: 0.16}
    )
    dup_n_grams: dict[int, float] = dataclasses.field(
        default_factory=lambda: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    )
    language: str = WORDS


@dataclasses.dataclass(kw_only=True)
class C4Quality(Step):
    """Rules of C4: lines without end punctuation go, documents of too few sentences too."""

    split_paragraph: bool = True
    remove_citations: bool = True
    filter_no_terminal_punct: bool = True
    min_num_sentences: int = 5
    min_words_per_line: int = 3
    max_word_length: int = 1000
    filter_lorem_ipsum: bool = True
    filter_javascript: bool = True
    filter_curly_bracket: bool = True
    filter_policy: bool = True
    language: str = WORDS


@dataclasses.dataclass(kw_only=True)
class C4Paragraphs(Step):
    """Documents without three lines of 200 characters are dropped (mC4)."""


@dataclasses.dataclass(kw_only=True)
class FinewebQuality(Step):
    """Rules of FineWeb on ends of lines, short lines and lists."""

    line_punct_thr: float = 0.12
    line_punct_exclude_zero: bool = False
    short_line_thr: float = 0.67
    short_line_length: int = 30
    char_duplicates_ratio: float = 0.01
    new_line_ratio: float = 0.3
    language: str = WORDS


@dataclasses.dataclass(kw_only=True)
class Decontaminate(Step):
    """Documents that share n words in a row with an evaluation set are dropped."""

    evaluation: str
    """Quoted glob of JSONL files; the file's stem names the set."""
    fields: list[str] = dataclasses.field(default_factory=list)
    """Fields that make the text of an item, joined in this order; empty for all strings."""
    n_grams: int = 12
    norm_numbers: bool = True
    """Numbers count as equal; turn off where items differ in their numbers alone."""
    language: str = WORDS


@dataclasses.dataclass(kw_only=True)
class ExactDedup(Step):
    """Of documents with the same text the first is kept."""


@dataclasses.dataclass(kw_only=True)
class NearDedup(Step):
    """Of documents that MinHash takes for nearly equal one is kept."""

    n_grams: int = 5
    num_buckets: int = 14
    hashes_per_bucket: int = 8
    """Similarity of even odds is about (1 / num_buckets) ** (1 / hashes_per_bucket)."""
    seed: int = 1
    norm_numbers: bool = True
    """Numbers count as equal; turn off where documents differ in their numbers alone."""
    language: str = WORDS


STEPS: dict[str, type[Step]] = {
    "normalize": Normalize,
    "ftfy": Ftfy,
    "pii": Pii,
    "symbol_lines": SymbolLines,
    "length": Length,
    "sample": Sample,
    "regex": Regex,
    "gopher_quality": GopherQuality,
    "gopher_repetition": GopherRepetition,
    "c4_quality": C4Quality,
    "c4_paragraphs": C4Paragraphs,
    "fineweb_quality": FinewebQuality,
    "decontaminate": Decontaminate,
    "exact_dedup": ExactDedup,
    "near_dedup": NearDedup,
}
"""Name in YAML -> parameters."""
WHOLE_CORPUS = (ExactDedup, NearDedup)
"""Steps that have to see every document before they can drop one."""
