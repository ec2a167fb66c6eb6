"""Arguments of the data_pipeline commands, typed by a dataclass per command.

Most commands take flat `key=value` words (`parse_arguments`): their fields are int or str; fields
without a default are required. Those with presets are composed by Hydra (`compose`); words are
checked first, because Hydra names no alternative to a wrong one. Hydra is imported on use: the
other commands start without it.
"""

import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

CONF_DIR = Path(__file__).resolve().parents[1] / "conf"


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


def run_command[T](
    node: type[T],
    command: Callable[[T], None],
    parse: Callable[[type[T], Sequence[str]], T] = parse_arguments,
) -> int:
    """Return the exit status of `command` run on sys.argv: 0, or 2 with one message on stderr."""
    try:
        command(parse(node, sys.argv[1:]))
    except PipelineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def compose[T](node: type[T], words: Sequence[str], *, root: str, group: str) -> T:
    """Return a `node` composed from conf/ROOT.yaml, a preset of its one group, and words.

    Args:
        node: dataclass; fields of type dict take any key below them and are left to the caller.
        words: `key=value`, also `key.below=value` for dicts; `GROUP=NAME` picks a file of
            conf/GROUP and `GROUP=PATH.yaml` a file anywhere.
        root: name of the file in conf/ that holds the defaults.
        group: folder in conf/ with the presets.

    Raises:
        PipelineError: unknown (the nearest key is named), missing or mistyped keys.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    values = _checked_words(node, words, group)
    preset = values.pop(group, None)
    ConfigStore.instance().store(group="schema", name=root, node=node, package="_global_")
    file, choice = None, f"{group}={preset}"
    if preset is None or str(preset).endswith((".yaml", ".yml")):
        file, choice = preset, f"~{group}"
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            composed = hydra_compose(root, overrides=[choice])
        parts: list[Any] = [composed]
        if file is not None:
            parts.append(_read_preset(node, Path(file)))
        OmegaConf.set_struct(composed, False)
        merged = OmegaConf.merge(*parts, *(_nested(k, v) for k, v in values.items()))
        return _instance(node, merged, "", f" or {group}=NAME" if preset is None else "")
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        place = f"{file}: " if isinstance(error, YAMLError) else ""
        raise PipelineError(f"{place}{_first_line(error)}") from None


def typed_node[T](node: type[T], values: Mapping[str, Any], where: str) -> T:
    """Return a `node` filled from a mapping of YAML.

    Args:
        node: dataclass.
        values: field -> value.
        where: what the fields are called in messages, e.g. `steps.length`.

    Raises:
        PipelineError: unknown (the nearest key is named), missing or mistyped keys.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    names = [field.name for field in dataclasses.fields(node)]  # type: ignore[arg-type]  # a dataclass
    for key in values:
        if key not in names:
            raise PipelineError(f"{where}.{key} is not a key{nearest(str(key), names)}")
    try:
        return _instance(node, OmegaConf.merge(OmegaConf.structured(node), dict(values)), where)
    except OmegaConfBaseException as error:
        key = f".{error.full_key}" if error.full_key else ""
        raise PipelineError(f"{where}{key}: {_first_line(error)}") from None
    except PipelineError as error:
        raise PipelineError(f"{where}: {error}") from None


def nearest(word: str, names: Iterable[str]) -> str:
    """Return `; did you mean NAME? choose from ...` for the name that is most like the word."""
    known = sorted(names)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} choose from {', '.join(known)}"


def presets(group: str) -> list[str]:
    """Return the names that `GROUP=NAME` accepts."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def _checked_words(node: type, words: Sequence[str], group: str) -> dict[str, Any]:
    """Return dotted key -> parsed value; every name at the top is a field or the group."""
    hints = {field.name: field.type for field in dataclasses.fields(node)}
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise PipelineError(f"{word!r} is not of the form key=value")
        if key != group and hints.get(key) is not str:
            value = _parsed(word)
        top, _, below = key.partition(".")
        if top not in hints and key != group:
            raise PipelineError(f"{key!r} is not a key{nearest(key, [*hints, group])}")
        if below and not str(hints[top]).startswith("dict["):
            raise PipelineError(f"{key!r} is not a key: {top} holds one value; write {top}=...")
        if key in values:
            raise PipelineError(f"{key!r} is given twice; keep one")
        is_file = str(value).endswith((".yaml", ".yml"))
        if key == group and not is_file and value not in presets(group):
            raise PipelineError(
                f"{key}={value} is not a preset{nearest(str(value), presets(group))}"
            )
        values[key] = value
    return values


def _parsed(word: str) -> Any:
    """Return the value of a word in Hydra's grammar: numbers, lists, quoted strings."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(word)
        if not override.is_sweep_override():
            return override.value()
        raise PipelineError(f"{word!r} gives alternatives; quote a value that has commas")
    except HydraException as error:
        raise PipelineError(f"{word!r} has no value ({_first_line(error)}); quote it") from None


def _read_preset(node: type, path: Path) -> Any:
    """Return the content of a YAML file whose keys are fields of the node."""
    from omegaconf import DictConfig, OmegaConf

    try:
        content = OmegaConf.load(path)
    except OSError as error:
        raise PipelineError(f"{path}: {error.strerror}; give a preset or a YAML file") from None
    if not isinstance(content, DictConfig):
        raise PipelineError(f"{path} holds no mapping; write keys such as steps:")
    names = [field.name for field in dataclasses.fields(node)]
    for key in content:
        if key not in names:
            raise PipelineError(f"{path}: {key} is not a key{nearest(str(key), names)}")
    return content


def _instance(node: type, merged: Any, where: str, otherwise: str = "") -> Any:
    from omegaconf import OmegaConf

    missing = list(OmegaConf.missing_keys(merged))
    if missing:
        prefix = f"{where}." if where else ""
        names = ", ".join(prefix + str(key) for key in missing)
        raise PipelineError(f"{names} must be given; add {prefix}{missing[0]}=...{otherwise}")
    instance = OmegaConf.to_object(merged)
    assert isinstance(instance, node)
    return instance


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": value}} for "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


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
