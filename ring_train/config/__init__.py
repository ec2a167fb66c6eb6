"""Typed config nodes and how they are composed. Imports neither torch nor megatron."""

from ring_train.config.choices import (
    AdapterExport,
    Architecture,
    DecayCurve,
    DecayLayerRule,
    LrDecayStyle,
    MtpExport,
    NewGates,
    NewRows,
    Packing,
    Precision,
    PromptFormat,
    RecomputeGranularity,
    RecomputeMethod,
    ScoreFunction,
    WeightFormat,
)
from ring_train.config.composition import ConfigError, compose, read_yaml, to_yaml
from ring_train.config.data import DataConfig, DomainConfig
from ring_train.config.evaluation import EvaluationConfig
from ring_train.config.lora import LoraConfig
from ring_train.config.machine import MachineConfig
from ring_train.config.model import ModelConfig
from ring_train.config.optim import OptimConfig
from ring_train.config.parallel import ParallelConfig
from ring_train.config.phases import BatchRampConfig, PhaseConfig
from ring_train.config.resilience import ResilienceConfig
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
from ring_train.config.train import CheckpointConfig, LoggingConfig, TrainConfig

__all__ = [
    "AdapterExport",
    "Architecture",
    "BatchRampConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "ConvertConfig",
    "DataConfig",
    "DecayCurve",
    "DecayLayerRule",
    "DomainConfig",
    "DryRunConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "ExplainConfig",
    "ExportConfig",
    "GenerateConfig",
    "LoggingConfig",
    "LoraConfig",
    "LrDecayStyle",
    "MachineConfig",
    "MergeCheckpointsConfig",
    "ModelConfig",
    "MtpExport",
    "NewGates",
    "NewRows",
    "OptimConfig",
    "Packing",
    "ParallelConfig",
    "PhaseConfig",
    "PlanSearchConfig",
    "PlotConfig",
    "Precision",
    "PromptFormat",
    "ProveMixtureConfig",
    "RecomputeGranularity",
    "RecomputeMethod",
    "ReproduceConfig",
    "ResilienceConfig",
    "ScoreConfig",
    "ScoreFunction",
    "SelectCheckpointConfig",
    "StatusConfig",
    "TrainConfig",
    "ValidateConfig",
    "VerifyCheckpointConfig",
    "VerifyExportConfig",
    "WeightFormat",
    "compose",
    "read_yaml",
    "to_yaml",
]
