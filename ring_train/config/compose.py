"""From YAML and `key=value` words to typed nodes, and back.

Every failure is a ConfigError that names the key and, where a name is wrong, the nearest right one.
Words are checked against the schema before Hydra sees them, because Hydra names no alternative.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ring_train.config.root import (
    Config,
    DryRunConfig,
    ExportConfig,
    GenerateConfig,
    ReproduceConfig,
    ScoreConfig,
)
from ring_train.errors import UserError

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"

ROOTS: dict[str, type] = {
    "pretrain": Config,
    "dry_run": DryRunConfig,
    "score": ScoreConfig,
    "export": ExportConfig,
    "generate": GenerateConfig,
    "reproduce": ReproduceConfig,
}


class ConfigError(UserError):
    """A word on the command line or a value in YAML that the schema does not allow."""


def compose(root: str, overrides: list[str]) -> Any:
    """Return the typed root node `root` after applying `key=value` words.

    Args:
        root: name of a file in `conf/` and key of ROOTS.
        overrides: words of the command line, later ones win.

    Raises:
        ConfigError: with all unknown words at once, else the first wrong value.
    """
    schema = ROOTS[root]
    words, entries = checked_words(schema, overrides)
    _register_schemas()
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            node = hydra_compose(root, overrides=words)
        OmegaConf.set_struct(node, False)  # lets free dicts grow; typed nodes stay closed
        return _typed(OmegaConf.merge(node, *entries))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_readable(error, schema)) from error


def presets(group: str) -> list[str]:
    """Return the names that `group=NAME` accepts."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def groups() -> list[str]:
    """Return the names of all groups of presets."""
    return sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir())


def to_yaml(config: Any) -> str:
    """Return every value of a root node as YAML that `read_yaml` accepts."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def read_yaml(path: str | Path, schema: type = Config) -> Any:
    """Return the root node written by `to_yaml`; unknown or missing keys are errors."""
    try:
        return _typed(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_readable(error, schema)}") from error


def checked_words(schema: type, overrides: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return (words for Hydra, entries of free dicts as nested dicts to merge).

    Free dicts are kept from Hydra because it refuses to add a key to them.

    Raises:
        ConfigError: listing every unknown name.
    """
    problems: list[str] = []
    words: list[str] = []
    entries: list[dict[str, Any]] = []
    for word in overrides:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            problems.append(f"{word!r} is not key=value: {_first_line(error)}")
            continue
        key = override.key_or_group
        found = _lookup(schema, key, override.value())
        if found.problem:
            problems.append(found.problem)
        elif found.in_free_dict and not override.is_delete():
            entries.append(_nested(key, override.value()))
        else:
            words.append(word)
    if problems:
        raise ConfigError("\n".join(problems))
    return words, entries


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the schema says about a key: a problem, or whether it lies in a dict[str, value]."""

    problem: str | None = None
    in_free_dict: bool = False


def _lookup(schema: type, key: str, value: Any) -> _Found:
    """Return what is known about one word, a group choice included."""
    if key not in groups() or isinstance(value, dict):
        return _lookup_key(schema, key)
    names = presets(key)
    if value is None or value in names:
        return _Found()
    hint = nearest(str(value), names)
    return _Found(f"{key}={value} is not a preset{hint}; choose from {', '.join(names)}")


def _lookup_key(schema: type, key: str) -> _Found:
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
            return _Found(_no_such_key(key, parts[:depth], part, fields, schema))
        node = _without_none(fields[part])
    return _Found(in_free_dict=in_free_dict or typing.get_origin(node) is dict)


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": value}} for "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


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
        hint = _without_none(hint)
        if dataclasses.is_dataclass(hint):
            keys += all_keys(typing.cast(type, hint), f"{prefix}{name}.")
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


def _typed(node: Any) -> Any:
    """Return the dataclass behind a composed node, or raise for values that nobody gave."""
    missing = sorted(OmegaConf.missing_keys(node))
    if missing:
        raise ConfigError(f"{', '.join(missing)}: no value given; add {missing[0]}=...")
    return OmegaConf.to_object(node)


def _readable(error: Exception, schema: type) -> str:
    """Return one line for an error of Hydra or OmegaConf: key=value, relation, way out."""
    deepest: BaseException = error
    while deepest.__cause__ is not None:
        deepest = deepest.__cause__
    for candidate in (deepest, error):
        key = getattr(candidate, "full_key", None)
        if not key:
            continue
        return _lookup_key(schema, key).problem or f"{key}: {_first_line(candidate)}"
    unchosen = re.search(r"You must specify '(\w+)'", str(error))
    if unchosen:
        group = unchosen.group(1)
        return f"{group}=PRESET is missing; choose from {', '.join(presets(group))}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def _register_schemas() -> None:
    """Tell Hydra the type of every root; repeating it changes nothing."""
    for name, schema in ROOTS.items():
        ConfigStore.instance().store(group="schema", name=name, node=schema, package="_global_")
