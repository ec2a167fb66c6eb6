"""Splitting Python source into code and prose."""

import ast
import importlib.util
import textwrap
from pathlib import Path

import pytest

from data_pipeline.docstrings import split_source

SOURCE = '''\
# Licence header.
# More of it.

"""Module text."""
import os


class A:
    """Class text.

    >>> A().f(1)
    2

    After the example.
    """

    def f(self, x):
        r"""Method \\text."""
        return "kept \u00e9" + x

    def sole(self):
        "only this"

    async def one_line(self): "inline text"

    field: int = 0
    """Field text."""
'''


def bare_strings(code: str) -> list[ast.Expr]:
    nodes = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Expr)]
    return [n for n in nodes if isinstance(getattr(n.value, "value", None), str)]


def test_docstrings_leave_the_code_and_become_prose() -> None:
    split = split_source(SOURCE)
    assert split.prose == (
        "Module text.",
        "Class text.\n\nAfter the example.",
        "Method \\text.",
        "only this",
        "inline text",
        "Field text.",
    )
    assert not bare_strings(split.code)
    assert "text" not in split.code
    assert split.code.startswith("import os\n")


def test_code_around_docstrings_is_unchanged() -> None:
    expected = """\
    class A:

        def f(self, x):
            return "kept \u00e9" + x

        def sole(self):
            ...

        async def one_line(self): ...

        field: int = 0
    """
    assert split_source(SOURCE).code == "import os\n\n\n" + textwrap.dedent(expected)


def test_a_docstring_after_wide_characters_on_its_line_is_cut_exactly() -> None:
    split = split_source('def f(x="\u00e9\u20ac"): "text"; return x\n')
    assert split.code == 'def f(x="\u00e9\u20ac"): ...; return x\n'


def test_code_after_a_bare_string_on_its_line_is_kept() -> None:
    assert split_source('import os\n"text"; x = 1\n').code == "import os\n...; x = 1\n"


def test_a_module_of_long_strings_is_documentation() -> None:
    text = "A line of documentation.\n" * 10
    split = split_source(f'topics = {{"a": """{text}""", "b": {text!r}}}\n')
    assert split.code == ""
    assert split.prose == (text.strip(), text.strip())


def test_a_module_with_much_documentation_keeps_its_code() -> None:
    text = "A line of documentation.\n    " * 50
    code = f"    return {list(range(200))}\n"
    split = split_source(f'def f():\n    """{text}"""\n{code}')
    assert split.code == "def f():\n" + code


def test_source_that_is_not_python_is_an_error() -> None:
    with pytest.raises(SyntaxError, match="parentheses"):
        split_source("print 1\n")


@pytest.mark.parametrize("module", ["asyncio.events", "argparse", "email.message", "typing"])
def test_real_modules_still_parse_and_hold_no_docstring(module: str) -> None:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    split = split_source(source)
    assert not bare_strings(split.code)
    assert len(split.prose) > 10
    stripped = [node for node in ast.walk(ast.parse(split.code)) if isinstance(node, ast.stmt)]
    original = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    assert len(stripped) >= len(original) - len(bare_strings(source))
