"""Typed config nodes and how they are composed. Imports neither torch nor megatron."""

from ring_train.config.choices import (
    Architecture,
    DecayLayerRule,
    LrDecayStyle,
    Precision,
    ScoreFunction,
)
from ring_train.config.composition import ConfigError, compose, read_yaml, to_yaml
from ring_train.config.data import DataConfig, DomainConfig
from ring_train.config.model import ModelConfig
from ring_train.config.optim import OptimConfig
from ring_train.config.parallel import ParallelConfig
from ring_train.config.root import (
    Config,
    DryRunConfig,
    ExportConfig,
    GenerateConfig,
    ReproduceConfig,
    ScoreConfig,
)
from ring_train.config.train import CheckpointConfig, LoggingConfig, TrainConfig

__all__ = [
    "Architecture",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DecayLayerRule",
    "DomainConfig",
    "DryRunConfig",
    "ExportConfig",
    "GenerateConfig",
    "LoggingConfig",
    "LrDecayStyle",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "Precision",
    "ReproduceConfig",
    "ScoreConfig",
    "ScoreFunction",
    "TrainConfig",
    "compose",
    "read_yaml",
    "to_yaml",
]
