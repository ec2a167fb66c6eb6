"""A sample as a person looks at it: its tokens in order, those that are trained marked."""

import dataclasses
import html
import itertools
from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer

TRAINED, CONTEXT, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
"""Bold green, faint, and back to what it was."""
OPEN, CLOSE = "[[", "]]"
"""Around trained text where there are no colours."""
UNFINISHED = "\ufffd"
"""What a decoder writes for the first bytes of a character."""
STYLE = """
body { font: 14px/1.5 sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #bbb; padding: 1em; }
span { background: #eee; color: #555; } span.b { background: #e2e2e2; }
span.t { background: #b9e6b9; color: #000; } span.t.b { background: #a3dba3; }
"""


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """One sample."""

    title: str
    ids: Sequence[int]
    trained: Sequence[bool]

    @property
    def summary(self) -> str:
        """How much of it is trained."""
        return f"{self.title}: {len(self.ids)} tokens, {sum(map(int, self.trained))} trained"


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """The fewest tokens that are whole characters."""

    text: str
    ids: list[int]
    first: int
    """Position of the first."""
    trained: bool


def to_terminal(view: View, tokenizer: Tokenizer, *, colors: bool) -> str:
    """Return the text of a sample; trained text is bold green, or in [[ ]] without colours."""
    marks = (
        {True: (TRAINED, PLAIN), False: (CONTEXT, PLAIN)}
        if colors
        else {True: (OPEN, CLOSE), False: ("", "")}
    )
    lines = [view.summary, "\n"]
    for trained, pieces in itertools.groupby(_pieces(view, tokenizer), lambda p: p.trained):
        lines += [marks[trained][0], *(piece.text for piece in pieces), marks[trained][1]]
    return "".join([*lines, "\n"])


def to_html(views: list[View], tokenizer: Tokenizer) -> str:
    """Return a page that needs no network: trained tokens are green, position and id are titles."""
    parts = [
        f"<!DOCTYPE html>\n<meta charset='utf-8'><title>Loss mask</title><style>{STYLE}</style>\n",
        "<p><span class='t'>Trained</span> tokens and <span>context</span>; shades alternate from "
        "token to token. Point at one for its position and id.</p>\n",
    ]
    for view in views:
        spans = [_span(piece, n) for n, piece in enumerate(_pieces(view, tokenizer))]
        parts += [f"<h3>{html.escape(view.summary)}</h3>\n<pre>", *spans, "</pre>\n"]
    return "".join(parts)


def _span(piece: _Piece, number: int) -> str:
    classes = " ".join(["t"] * piece.trained + ["b"] * (number % 2))
    title = f"{piece.first}: {' '.join(map(str, piece.ids))}"
    return f"<span class='{classes}' title='{title}'>{html.escape(piece.text)}</span>"


def _pieces(view: View, tokenizer: Tokenizer) -> Iterator[_Piece]:
    held: list[int] = []
    for position, (id_, trained) in enumerate(zip(view.ids, view.trained, strict=True)):
        held.append(int(id_))
        text = tokenizer.decode(held, skip_special_tokens=False)
        following = position + 1
        goes_on = following < len(view.ids) and bool(view.trained[following]) == bool(trained)
        if text.endswith(UNFINISHED) and goes_on:
            continue
        yield _Piece(text, held, following - len(held), bool(trained))
        held = []
