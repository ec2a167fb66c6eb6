"""The closed sets of words that a config may contain. Member name and value are the same word."""

from enum import StrEnum, auto


class Architecture(StrEnum):
    """Hugging Face family whose folder layout, names and numerics a model follows."""

    bailing_moe = auto()
    """Ling-lite, Ring-lite: softmax router, no QK-norm, normalised lm_head."""
    bailing_moe_v2 = auto()
    """Ling 2.0: softmax attention, sigmoid router with expert bias."""
    bailing_moe_linear_v2 = auto()
    """Ring-linear 2.0: the same with lightning attention in most layers."""


class DecayLayerRule(StrEnum):
    """How the decay of lightning attention depends on the 0-based layer index l of L layers."""

    zero_based = auto()
    """Factor 1 - l / (L - 1) + 1e-5."""
    shifted = auto()
    """Factor 1 - (l - 1) / (L - 1) + 1e-5."""


class ScoreFunction(StrEnum):
    """What turns router logits into the scores that experts are selected by."""

    sigmoid = auto()
    softmax = auto()


class LrDecayStyle(StrEnum):
    """Shape of the learning rate after warmup."""

    constant = auto()
    """Stays at `lr`."""
    cosine = auto()
    """Half a cosine from `lr` to `min_lr`, ending with the last step."""
    linear = auto()
    """A line from `lr` to `min_lr`, ending with the last step."""
    wsd = auto()
    """Stays at `lr`, then falls linearly to `min_lr` over the last `wsd_decay_steps` steps."""


class RecomputeGranularity(StrEnum):
    """What the backward pass computes again instead of keeping it in memory."""

    full = auto()
    """Whole layers, MTP layers included."""
    selective = auto()
    """The parts that `recompute_modules` names, in every layer."""


class RecomputeMethod(StrEnum):
    """Which layers of a pipeline stage full recomputation covers."""

    uniform = auto()
    """All of them, in groups of `recompute_num_layers` of which only the input is kept."""
    block = auto()
    """The first `recompute_num_layers`, one by one."""


class Packing(StrEnum):
    """How documents become rows."""

    contiguous = auto()
    """End to end; cut wherever a row ends."""
    best_fit = auto()
    """Whole documents with padding; only those longer than a row are cut."""
    whole = auto()
    """Whole documents with padding; longer ones are refused."""


class Precision(StrEnum):
    """Dtype of weights and activations; master weights and moments are fp32 in both."""

    fp32 = auto()
    bf16 = auto()


class WeightFormat(StrEnum):
    """Dtype of the weights of an export."""

    fp32 = auto()
    bf16 = auto()
    fp8 = auto()
    """e4m3 in blocks of 128 x 128 with fp32 scales; what is no large projection stays bf16."""


class MtpExport(StrEnum):
    """Where an export puts the multi-token-prediction layers."""

    layer = auto()
    """Behind the last layer, in the same files."""
    separate = auto()
    """In the folder `mtp` inside the output, as a model of one layer."""
    none = auto()
    """Nowhere."""


class AdapterExport(StrEnum):
    """What an export makes of low-rank adapters."""

    merged = auto()
    """Added to the weights that they belong to: a folder like any other."""
    separate = auto()
    """A PEFT adapter folder beside the folder of the frozen weights."""


class PromptFormat(StrEnum):
    """How a problem becomes a prompt."""

    chat = auto()
    """Messages, rendered with the tokenizer's chat template and its generation prompt."""
    text = auto()
    """The text of the problem itself, for a model without chat."""


class NewGates(StrEnum):
    """What the output gate of a lightning layer that was a softmax layer starts from."""

    zero = auto()
    """Half open for every token."""
    normal = auto()
    """Drawn like the weights of a new model."""


class NewRows(StrEnum):
    """What the rows of new ids start from, in the embedding and in lm_head."""

    mean = auto()
    """The mean of the rows of the old ids."""
    normal = auto()
    """Drawn around that mean, with the variance that each channel has over the old ids."""


class DecayCurve(StrEnum):
    """The learning-rate decay that merging checkpoints stands for; x runs from 0 to 1."""

    linear = auto()
    """1 - x: checkpoints at equal distances count equally."""
    cosine = auto()
    """(1 + cos(pi x)) / 2."""
    one_minus_sqrt = auto()
    """1 - sqrt(x)."""
    constant = auto()
    """No decay: the last checkpoint alone, to compare with."""


class Kernel(StrEnum):
    """What computes an operation that Triton may fuse."""

    auto = "auto"
    """Triton for what is on a GPU, else torch."""
    torch = "torch"
    triton = "triton"


class LightningKernel(StrEnum):
    """What computes lightning attention."""

    auto = "auto"
    """Triton for what is on a GPU, else torch."""
    torch = "torch"
    triton = "triton"
    fla = "fla"
    """flash-linear-attention, `chunk_simple_gla` with a constant decay."""


class CrossEntropyKernel(StrEnum):
    """How the loss of a token is computed from its hidden state."""

    full = auto()
    """From all logits at once."""
    chunked = auto()
    """From the logits of some tokens at a time, which the backward pass computes again."""


class ExpertKernel(StrEnum):
    """How the routed experts of a rank are multiplied."""

    auto = "auto"
    """Grouped, unless experts have adapters or are unusual."""
    sequential = "sequential"
    """One by one."""
    grouped = "grouped"
    """In one product over all experts of the rank."""


class TransformerImpl(StrEnum):
    """Where projections, norms, softmax attention and experts come from."""

    local = auto()
    """torch, and the kernels of this project."""
    transformer_engine = auto()


class Fp8(StrEnum):
    """In which form the inputs of matrix products are rounded to 8 bits."""

    none = auto()
    blockwise = auto()
    """e4m3, scales per 1 x 128 of activations and gradients and per 128 x 128 of weights."""


class TokenDispatcher(StrEnum):
    """How tokens travel to the ranks of their experts."""

    alltoall = auto()
    flex = auto()
    """Kernels of a communication library that fuse permutation and transfer."""


class FlexDispatcher(StrEnum):
    """Communication library behind the flex dispatcher."""

    deepep = auto()
    hybridep = auto()
