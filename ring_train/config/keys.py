"""What the nodes know about dotted keys, and which known name is nearest to a wrong one."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Found:
    """What the schema says about a key: a problem, or whether it lies in a dict[str, value]."""

    problem: str | None = None
    in_free_dict: bool = False


def lookup_key(schema: type, key: str) -> Found:
    """Follow a dotted key through nodes and free dicts."""
    node: Any = schema
    in_free_dict = False
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if typing.get_origin(node) is dict:
            in_free_dict = True
            node = typing.get_args(node)[1]
            if not dataclasses.is_dataclass(node):
                break
            continue
        fields = typing.get_type_hints(node) if dataclasses.is_dataclass(node) else {}
        if part not in fields:
            return Found(_no_such_key(key, parts[:depth], part, fields, schema))
        node = _without_none(fields[part])
    return Found(in_free_dict=in_free_dict or typing.get_origin(node) is dict)


def _no_such_key(
    key: str, parents: list[str], part: str, fields: Iterable[str], schema: type
) -> str:
    """Return the message for an unknown key, with the nearest one here, else anywhere."""
    prefix = "".join(f"{parent}." for parent in parents)
    here = {name: prefix + name for name in fields}
    anywhere = {name.rsplit(".", 1)[-1]: name for name in all_keys(schema)}
    for known, word in ((here, part), (anywhere, key.rsplit(".", 1)[-1])):
        close = difflib.get_close_matches(word, list(known), n=1)
        if close:
            return f"{key} is not a key; did you mean {known[close[0]]}?"
    return f"{key} is not a key; choose from {', '.join(sorted(here.values())) or 'none'}"


def all_keys(schema: type, prefix: str = "") -> list[str]:
    """Return the dotted names of all leaves of a node type."""
    keys = []
    for name, hint in typing.get_type_hints(schema).items():
        node = _without_none(hint)
        if dataclasses.is_dataclass(node):
            keys += all_keys(typing.cast(type, node), f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def nearest(word: str, names: Iterable[str]) -> str:
    """Return '; did you mean NAME?' for the most similar name, or nothing."""
    close = difflib.get_close_matches(word, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _without_none(hint: Any) -> Any:
    """Return T of `T | None`, any other annotation unchanged."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint
