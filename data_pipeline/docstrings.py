"""Split Python source into code without docstrings and the docstrings as prose."""

import ast
import dataclasses
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator

LONG_STRING_LINES = 4
"""A string literal of this many lines or more counts as text when a module is judged (below)."""

_BLOCK_FIELDS = ("body", "orelse", "finalbody", "handlers", "cases")
_TRIPLE_QUOTED = re.compile(r'"""(?s:.*?)"""|\'\'\'(?s:.*?)\'\'\'')
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

    Docstrings and other bare strings are cut from the code. A module that is mostly long strings
    (`pydoc_data.topics`, `torch._torch_docs`) is documentation: it gives prose only.

    Raises:
        SyntaxError: the source is not Python of this interpreter.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    if sum(map(len, _TRIPLE_QUOTED.findall(source))) > len(source) / 2:
        long_strings = [node for node in ast.walk(tree) if _is_long_string(node)]
        if sum(len(node.value) for node in long_strings) > len(source) / 2:
            return SplitSource("", _prose(node.value for node in _in_order(long_strings)))
    blocks = list(_blocks(tree))
    statements = _in_order(node for block in blocks for node in block if _is_bare_string(node))
    sole = {block[0] for block in blocks if all(map(_is_bare_string, block))}
    code = _LEADING_COMMENTS.sub("", _without_statements(source, statements, sole=sole))
    return SplitSource(code, _prose(statement.value.value for statement in statements))


def _is_long_string(node: ast.AST) -> bool:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return False
    return node.value.count("\n") >= LONG_STRING_LINES - 1


def _is_bare_string(node: ast.AST) -> bool:
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return False
    return isinstance(node.value.value, str)


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Yield every statement list of a tree; expressions, which are most of it, are not visited."""
    for name in _BLOCK_FIELDS:
        block = getattr(node, name, None)
        if isinstance(block, list) and block:
            if isinstance(block[0], ast.stmt):
                yield block
            for child in block:
                yield from _blocks(child)


def _in_order(nodes: Iterable[ast.AST]) -> list[ast.AST]:
    return sorted(nodes, key=lambda node: (node.lineno, node.col_offset))


def _without_statements(source: str, statements: list[ast.AST], *, sole: set[ast.AST]) -> str:
    """Return the source with statements cut out; those in `sole` leave an ellipsis."""
    lines = source.encode().splitlines(keepends=True)  # ast counts columns in UTF-8 bytes
    for statement in reversed(statements):
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
