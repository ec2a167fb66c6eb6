"""Split Python source into code without docstrings and the docstrings as prose."""

import ast
import dataclasses
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator

LONG_STRING_LINES = 4
"""A string literal of this many lines or more counts as text when a module is judged (below)."""
CHARACTERS_PER_STATEMENT = 150
"""Modules of code have fewer, without docstrings."""

_BLOCK_FIELDS = ("body", "orelse", "finalbody", "handlers", "cases")
_LEADING_COMMENTS = re.compile(r"\A(?:[ \t]*(?:#[^\n]*)?\n)+")


@dataclasses.dataclass(frozen=True, slots=True)
class SplitSource:
    """A module taken apart; no docstring is in both fields."""

    code: str
    """Source without docstrings and leading comments; empty if the module is mostly text."""
    prose: tuple[str, ...]
    """Docstrings, dedented, in source order, without doctest examples."""


def split_source(source: str) -> SplitSource:
    """Return the code and the prose of a module.

    Docstrings and other bare strings are cut from the code. A module whose rest is mostly long
    strings (`pydoc_data.topics`, `torch._torch_docs`) is documentation: it gives prose only.

    Raises:
        SyntaxError: the source is not Python of this interpreter.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    blocks = list(_blocks(tree))
    statements = [node for block in blocks for node in block if _bare_string(node) is not None]
    statements.sort(key=lambda node: (node.lineno, node.col_offset))
    docstrings = [_bare_string(node) or "" for node in statements]
    size = len(source) - sum(map(len, docstrings))
    if size > CHARACTERS_PER_STATEMENT * sum(map(len, blocks)):  # spares most modules a slow walk
        long_strings = _long_strings(tree)
        if sum(map(len, long_strings)) - sum(map(len, docstrings)) > size / 2:
            return SplitSource("", _prose(long_strings))
    sole = {block[0] for block in blocks if all(_bare_string(n) is not None for n in block)}
    code = _LEADING_COMMENTS.sub("", _without_statements(source, statements, sole=sole))
    return SplitSource(code, _prose(docstrings))


def _long_strings(tree: ast.Module) -> list[str]:
    """Return all string literals of LONG_STRING_LINES or more, in source order."""
    found = [
        (node.lineno, node.col_offset, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.count("\n") >= LONG_STRING_LINES - 1
    ]
    return [text for _, _, text in sorted(found)]


def _bare_string(node: ast.stmt) -> str | None:
    """Return the text of a statement that is only a string, as docstrings are, else None."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return None
    return node.value.value if isinstance(node.value.value, str) else None


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Yield every statement list of a tree; expressions, which are most of it, are not visited."""
    for name in _BLOCK_FIELDS:
        block = getattr(node, name, None)
        if isinstance(block, list) and block:
            if isinstance(block[0], ast.stmt):
                yield block
            for child in block:
                yield from _blocks(child)


def _without_statements(source: str, statements: list[ast.stmt], *, sole: set[ast.stmt]) -> str:
    """Return the source with statements cut out; those in `sole` leave an ellipsis."""
    lines = source.encode().splitlines(keepends=True)  # ast counts columns in UTF-8 bytes
    for statement in reversed(statements):
        assert statement.end_lineno is not None
        first, last = statement.lineno - 1, statement.end_lineno - 1
        before = lines[first][: statement.col_offset]
        after = lines[last][statement.end_col_offset :]
        keeps_line = statement in sole or before.strip() or after.strip()
        lines[first : last + 1] = [before + b"..." + after] if keeps_line else []
    return b"".join(lines).decode()


def _prose(strings: Iterable[str]) -> tuple[str, ...]:
    cleaned = (_without_doctests(inspect.cleandoc(string)).strip() for string in strings)
    return tuple(text for text in cleaned if text)


def _without_doctests(text: str) -> str:
    """Return the text without `>>>` examples: from the prompt to the next blank line."""
    kept = []
    in_example = False
    for line in text.split("\n"):
        stripped = line.strip()
        in_example = stripped.startswith(">>>") or (in_example and stripped != "")
        if not in_example:
            kept.append(line.rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept))
