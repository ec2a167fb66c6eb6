"""From YAML and `key=value` words to typed nodes, and back.

Every failure is a ConfigError that names the key and, where a name is wrong, the nearest right one.
Words are checked against the schema before Hydra sees them, because Hydra names no alternative.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ring_train.config.keys import Found, lookup_key, nearest
from ring_train.config.model import ModelConfig
from ring_train.config.root import (
    Config,
    ConvertConfig,
    DryRunConfig,
    EvaluateConfig,
    ExplainConfig,
    ExportConfig,
    GenerateConfig,
    MergeCheckpointsConfig,
    PlanSearchConfig,
    PlotConfig,
    ProveMixtureConfig,
    ReproduceConfig,
    ScoreConfig,
    SelectCheckpointConfig,
    StatusConfig,
    ValidateConfig,
    VerifyCheckpointConfig,
    VerifyExportConfig,
)
from ring_train.errors import UserError

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"

ROOTS: dict[str, type] = {
    "pretrain": Config,
    "sft": Config,
    "dry_run_sft": DryRunConfig,
    "build_index_sft": Config,
    "dry_run": DryRunConfig,
    "plan_search": PlanSearchConfig,
    "build_index": Config,
    "explain": ExplainConfig,
    "prove_mixture": ProveMixtureConfig,
    "score": ScoreConfig,
    "export": ExportConfig,
    "convert": ConvertConfig,
    "evaluate": EvaluateConfig,
    "validate": ValidateConfig,
    "merge_checkpoints": MergeCheckpointsConfig,
    "select_checkpoint": SelectCheckpointConfig,
    "generate": GenerateConfig,
    "reproduce": ReproduceConfig,
    "status": StatusConfig,
    "plot": PlotConfig,
    "verify_checkpoint": VerifyCheckpointConfig,
    "verify_export": VerifyExportConfig,
}


OPTIONAL_GROUPS = {"experiment"}
INITIAL_MODEL = "initial"
"""Preset that exists while a run is composed around the model of its initial weights."""


class ConfigError(UserError):
    """A word on the command line or a value in YAML that the schema does not allow."""


def compose(root: str, overrides: list[str], model: ModelConfig | None = None) -> Any:
    """Return the typed root node `root` after applying `key=value` words.

    Args:
        root: name of a file in `conf/` and key of ROOTS.
        overrides: words of the command line, later ones win.
        model: in place of a preset; words and experiments change its values as those of a preset.

    Raises:
        ConfigError: with all unknown words at once, else the first wrong value.
    """
    schema = ROOTS[root]
    words, entries = checked_words(schema, overrides)
    _register_schemas()
    if model is not None:
        node = dataclasses.asdict(model)
        ConfigStore.instance().store(group="model", name=INITIAL_MODEL, node=node)
        words.append(f"model={INITIAL_MODEL}")
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            node = hydra_compose(root, overrides=words)
        # Lets free dicts grow; typed nodes stay closed.
        OmegaConf.set_struct(node, False)
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
    except (OSError, YAMLError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error
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
            problems.append(
                f"{word!r} is not key=value ({_first_line(error)}); write words like model=tiny"
            )
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


def _lookup(schema: type, key: str, value: Any) -> Found:
    """Return what is known about one word, a group choice included."""
    if key not in groups() or isinstance(value, dict):
        return lookup_key(schema, key)
    names = presets(key)
    if value in names or (value is None and key in OPTIONAL_GROUPS):
        return Found()
    hint = nearest(str(value), names)
    return Found(f"{key}={value} is not a preset{hint}; choose from {', '.join(names)}")


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": value}} for "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


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
    # Hydra keeps the key only in the text of an error about a file.
    in_text = re.search(r"full_key: (\S+)", str(error))
    key = getattr(deepest, "full_key", None) or (in_text and in_text.group(1))
    if key:
        return lookup_key(schema, key).problem or f"{key}: {_first_line(deepest)}"
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
