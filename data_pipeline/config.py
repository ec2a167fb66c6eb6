"""`key=value` arguments of the data_pipeline commands, typed by a dataclass per command.

A command declares a dataclass whose fields are int or str; fields without a default are required.
"""

import dataclasses
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any


class PipelineError(ValueError):
    """What a person wrote or a file holds is wrong: path and value; violated relation; way out."""


def parse_arguments[T](node: type[T], arguments: Sequence[str]) -> T:
    """Return a `node` filled from `key=value` arguments.

    Raises:
        PipelineError: unknown (the nearest key is named), repeated, missing or mistyped keys.
    """
    fields = {field.name: field for field in dataclasses.fields(node)}  # type: ignore[arg-type]  # a dataclass
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise PipelineError(f"{argument!r} is not of the form key=value; {_usage(fields)}")
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise PipelineError(f"{key!r} is not a key; did you mean {nearest!r}? {_usage(fields)}")
        if key in values:
            raise PipelineError(f"{key!r} is given twice; keep one")
        values[key] = _typed(key, text, fields[key].type)
    missing = [name for name, field in fields.items() if name not in values and _required(field)]
    if missing:
        raise PipelineError(f"{', '.join(missing)} must be given; {_usage(fields)}")
    return node(**values)


def run_command[T](node: type[T], command: Callable[[T], None]) -> int:
    """Return the exit status of `command` run on sys.argv: 0, or 2 with one message on stderr."""
    try:
        command(parse_arguments(node, sys.argv[1:]))
    except PipelineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _typed(key: str, text: str, kind: object) -> int | str:
    if kind is str:
        return text
    assert kind is int, f"field {key} must be annotated int or str"
    try:
        return int(text)
    except ValueError:
        raise PipelineError(f"{key}={text} is not a whole number; write e.g. {key}=4096") from None


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING


def _usage(fields: dict[str, dataclasses.Field[Any]]) -> str:
    keys = (f"{n}=..." if _required(f) else f"[{n}={f.default}]" for n, f in fields.items())
    return "keys: " + " ".join(keys)
