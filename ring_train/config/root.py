"""Root nodes: one per command, named like its file in `conf/`.

Nested nodes have no default: the defaults list of the root's YAML chooses them.
"""

from dataclasses import dataclass, field

from ring_train.config.choices import (
    AdapterExport,
    DecayCurve,
    DecayLayerRule,
    MtpExport,
    NewGates,
    NewRows,
    Precision,
    WeightFormat,
)
from ring_train.config.data import DataConfig
from ring_train.config.evaluation import EvaluationConfig
from ring_train.config.kernels import KernelsConfig
from ring_train.config.lora import LoraConfig
from ring_train.config.machine import MachineConfig
from ring_train.config.model import ModelConfig
from ring_train.config.optim import OptimConfig
from ring_train.config.parallel import ParallelConfig
from ring_train.config.phases import PhaseConfig
from ring_train.config.resilience import ResilienceConfig
from ring_train.config.train import CheckpointConfig, LoggingConfig, TrainConfig


@dataclass(kw_only=True)
class Config:
    """One training run."""

    model: ModelConfig
    parallel: ParallelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    run_dir: str
    """Folder of the run; the same folder resumes the run."""
    phases: dict[str, PhaseConfig] = field(default_factory=dict)
    """In order; empty = one phase of train.num_steps."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    init_from: str | None = None
    """Checkpoint or Hugging Face folder with the initial weights; null = random."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters that are trained in place of the weights of `init_from`."""
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    """What the run must fit on; a plan that does not is refused before ranks start."""
    profile: bool = False
    """Trace steps and memory: logging.profile_steps of logging.profile_ranks."""
    seed: int = 1234
    decay_layer_rule: DecayLayerRule | None = None
    """For `init_from` of a linear Hugging Face folder whose config does not say it."""


@dataclass(kw_only=True)
class DryRunConfig(Config):
    """A run to be planned and printed, not started."""

    world_size: int | None = None
    """Ranks; null = the fewest that the parallel sizes allow."""
    json: str | None = None
    """File that also receives the plan; null = none."""


@dataclass(kw_only=True)
class PlanSearchConfig(Config):
    """The best layout of a run on a number of devices."""

    world_size: int
    """Ranks."""
    best: int = 5
    """Layouts printed."""
    json: str | None = None
    """File that also receives them; null = none."""


@dataclass(kw_only=True)
class ScoreConfig:
    """Log-probabilities of given token ids under a Hugging Face folder."""

    hf_dir: str
    prompts: str
    """JSON file {"prompts": [[ids]]}."""
    output: str
    """JSON file to write."""
    parallel: ParallelConfig
    precision: Precision = Precision.fp32
    packed: bool = False
    """All prompts in one row, isolated from each other."""
    grad_norms: str | None = None
    """JSON file that receives losses and gradient norms; null = none."""
    decay_layer_rule: DecayLayerRule | None = None
    """For a linear folder whose config does not say it."""


@dataclass(kw_only=True)
class ExportConfig:
    """A checkpoint turned into a Hugging Face folder."""

    checkpoint: str
    """Checkpoint folder, or run folder for its latest one."""
    output: str
    precision: WeightFormat = WeightFormat.bf16
    """Dtype of the exported weights."""
    mtp: MtpExport = MtpExport.layer
    """Where the multi-token-prediction layers go."""
    max_shard_bytes: int = 4 * 2**30
    """A file is closed before its tensors would exceed this."""
    adapter: AdapterExport | None = None
    """What becomes of adapters; null = merged, where there are any."""
    base_model: str | None = None
    """Hugging Face folder that separate adapters belong to; null = init_from of the run."""
    decay_layer_rule: DecayLayerRule | None = None
    """For a checkpoint that does not say it."""


@dataclass(kw_only=True)
class ConvertConfig:
    """A Hugging Face folder turned into one of another layer pattern or vocabulary."""

    hf_dir: str
    output: str
    layer_group_size: int | None = None
    """Of the new model, 1 = all softmax; null = as it is."""
    group_norm_size: int | None = None
    """Norm groups of lightning layers, where there were none."""
    new_gates: NewGates = NewGates.zero
    """What output gates of new lightning layers start from."""
    vocab_size: int | None = None
    """Rows of embedding and lm_head; null = as they are."""
    vocab_multiple: int = 1
    """The rows are rounded up to a multiple of this."""
    tokenizer: str | None = None
    """Folder of a tokenizer with more ids; null = that of hf_dir."""
    new_rows: NewRows = NewRows.mean
    """What rows of new ids start from."""
    precision: WeightFormat | None = None
    """Dtype of the written weights; null = that of hf_dir."""
    seed: int = 1234
    """Of what is drawn."""
    decay_layer_rule: DecayLayerRule | None = None
    """Of new lightning layers, null = zero_based; or for a linear folder that does not say it."""


@dataclass(kw_only=True)
class EvaluateConfig:
    """Problems answered by a checkpoint or a Hugging Face folder."""

    parallel: ParallelConfig
    evaluation: EvaluationConfig
    checkpoint: str | None = None
    """Checkpoint folder, or run folder for its latest one."""
    hf_dir: str | None = None
    """Hugging Face folder; exactly one of the two is given."""
    tokenizer: str | None = None
    """Folder of the tokenizer; null = what the checkpoint names, or the Hugging Face folder."""
    output: str | None = None
    """JSON file that receives the figures; null = none."""
    answers: str | None = None
    """JSONL file that receives the answers; null = none."""
    precision: Precision | None = None
    """Dtype of the weights; null = the checkpoint's, fp32 for a Hugging Face folder."""
    seed: int = 1234
    decay_layer_rule: DecayLayerRule | None = None
    """For a linear Hugging Face folder whose config does not say it."""


@dataclass(kw_only=True)
class MergeCheckpointsConfig:
    """Checkpoints of one run, averaged in place of a learning-rate decay."""

    run_dir: str
    """Run folder whose checkpoints are merged."""
    output: str
    """Folder of the merged checkpoint."""
    last: int | None = None
    """The newest so many checkpoints; exactly one of last and steps is given."""
    steps: list[int] | None = None
    """The checkpoints after these steps."""
    curve: DecayCurve = DecayCurve.linear
    """The decay that the average stands for."""
    validation: str | None = None
    """JSON file that receives the held-out losses of the merged and of the last checkpoint; null =
    not measured."""


@dataclass(kw_only=True)
class ValidateConfig:
    """Held-out loss of weights, side by side."""

    weights: list[str]
    """Checkpoints, run folders for their latest ones, or Hugging Face folders."""
    parallel: ParallelConfig
    run: str | None = None
    """Checkpoint or run folder whose data is read; null = the first checkpoint of the weights."""
    eval_steps: int | None = None
    """Micro batches per data-parallel rank and domain; null = as many as that run."""
    output: str | None = None
    """JSON file that receives the losses; null = none."""
    precision: Precision | None = None
    """Dtype of the weights; null = the checkpoint's, fp32 for a Hugging Face folder."""
    decay_layer_rule: DecayLayerRule | None = None
    """For linear Hugging Face folders whose config does not say it."""


@dataclass(kw_only=True)
class SelectCheckpointConfig:
    """The checkpoint of a run to go on from."""

    run: str
    """Run folder."""
    min_entropy: float = 0.3
    """Nats per token."""
    max_entropy: float = 0.5
    output: str | None = None
    """JSON file that also receives the ranking; null = none."""


@dataclass(kw_only=True)
class GenerateConfig:
    """Text continued by a Hugging Face folder."""

    hf_dir: str
    prompt: str
    max_new_tokens: int = 128
    temperature: float = 1.0
    """0 = greedy."""
    top_p: float = 1.0
    seed: int = 1234
    trust_remote_code: bool = False
    """Run Python files of the folder that are not ring_train's own."""


@dataclass(kw_only=True)
class ExplainConfig:
    """Where a sample of a run comes from."""

    run: str
    """Run folder."""
    sample: int
    """Global index from 0."""
    text: bool = False
    """Also print the text."""


@dataclass(kw_only=True)
class ProveMixtureConfig:
    """The ledgers of a run, computed again from its plan."""

    run: str
    """Run folder."""
    sample: int | None = None
    """Also the planned ledger after this many samples."""


@dataclass(kw_only=True)
class ReproduceConfig:
    """A recorded run, run again."""

    run: str
    """Run folder to repeat."""
    run_dir: str | None = None
    """Folder of the repetition; null = beside the recorded run."""


@dataclass(kw_only=True)
class StatusConfig:
    """Where a run stands."""

    run_dir: str
    """Run folder."""
    json: str | None = None
    """File that also receives the status; null = none."""
    watch_s: float | None = None
    """Print again so often; null = once."""


@dataclass(kw_only=True)
class PlotConfig:
    """The pictures of a run, drawn again."""

    run_dir: str
    """Run folder; receives the pictures."""


@dataclass(kw_only=True)
class VerifyCheckpointConfig:
    """A checkpoint, checked byte by byte."""

    folder: str
    """Checkpoint folder, or run folder for its latest one."""


@dataclass(kw_only=True)
class VerifyExportConfig:
    """An exported folder, held against the model that was trained."""

    hf_dir: str
    """Hugging Face folder; receives certificate.json."""
    checkpoint: str | None = None
    """Checkpoint folder, or run folder for its latest one; null = the folder is its own source."""
    mtp: MtpExport = MtpExport.layer
    """Where the export was told to put the multi-token-prediction layers of the checkpoint."""
    prompts: str | None = None
    """JSON file {"prompts": [[ids]]}; null = the same texts for every folder."""
    vllm: str | None = None
    """Python of an environment with vLLM and our plugin; null = vLLM is not run."""
