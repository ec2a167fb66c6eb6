"""What a person chooses about conversations, and the exception for one that is none."""

import dataclasses
from typing import Any

import orjson

from data_pipeline.config import PipelineError

ON_REWRITE = ("refuse", "split")
ON_LONG = ("refuse", "drop")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How conversations become samples."""

    template_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Variables of the template, e.g. `enable_thinking`; those of a record go before."""
    on_rewrite: str = "refuse"
    """Of a conversation whose earlier turns the template rewrites: `refuse` it, or `split` it into
    one sample a turn."""
    max_tokens: int = 0
    """Of a sample, end-of-text included; 0 for any number."""
    on_long: str = "refuse"
    """`refuse` a longer sample, or `drop` and count it."""

    def __post_init__(self) -> None:
        for key, allowed in (("on_rewrite", ON_REWRITE), ("on_long", ON_LONG)):
            if (value := getattr(self, key)) not in allowed:
                raise PipelineError(f"{key}={value} is unknown; choose {' or '.join(allowed)}")
        if self.max_tokens < 0:
            raise PipelineError(f"max_tokens={self.max_tokens} is below 0; 0 sets no limit")


class ChatFault(Exception):
    """A record that is no conversation, or one that the template does not render as it must."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        """A short word, the key it is counted under."""
        self.detail = detail


def parse_template_arguments(text: str) -> dict[str, Any]:
    """Return the mapping that `template_arguments=` holds as JSON; empty text is an empty one."""
    try:
        arguments = orjson.loads(text or "{}")
    except orjson.JSONDecodeError as error:
        raise PipelineError(_not_a_mapping(text, str(error))) from None
    if not isinstance(arguments, dict):
        raise PipelineError(_not_a_mapping(text, f"a {type(arguments).__name__}"))
    return arguments


def _not_a_mapping(text: str, found: str) -> str:
    return (
        f"template_arguments={text} is not a JSON object ({found}); write e.g. "
        "template_arguments='{\"enable_thinking\": true}'"
    )
