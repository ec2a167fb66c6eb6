"""Arguments of data_pipeline.curate."""

import dataclasses
import enum
from typing import Any

from data_pipeline.sources import SourceOptions


class Compression(enum.Enum):
    """Of the finished documents."""

    none = "none"
    zst = "zst"


class Dropped(enum.Enum):
    """What is written of dropped documents."""

    none = "none"
    ids = "ids"
    text = "text"


@dataclasses.dataclass(kw_only=True)
class Curate:
    """Arguments."""

    input: str
    """Files, globs, folders or datasets, separated by commas."""
    output: str
    """Folder that appears whole: DOMAIN-NUMBER.jsonl, dropped/STEP.jsonl and curation.json."""
    steps: dict[str, Any]
    """Name -> parameters, in order; `step:` says what it is if the name does not."""
    workers: int = 1
    compression: Compression = Compression.none
    dropped: Dropped = Dropped.ids
    file_bytes: int = 4_000_000_000
    """A domain's next file begins here."""
    block_documents: int = 20_000
    """Documents that one process does at a time."""
    text_key: str = "text"
    id_key: str = "id"
    domain_key: str = "domain"
    domain: str = ""
    """Of records that name none; empty: the stem of the file's name."""
    on_error: str = "refuse"
    """`refuse` ends at the first bad record or duplicate id; `skip` counts them."""
    max_document_bytes: int = 67_108_864

    def source_options(self) -> SourceOptions:
        """Return how records are read."""
        return SourceOptions(
            text_key=self.text_key,
            id_key=self.id_key,
            domain_key=self.domain_key,
            domain=self.domain,
            on_error=self.on_error,
            max_document_bytes=self.max_document_bytes,
        )
