"""The machine that a plan is held against: sizes and rates of one device and its links."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class MachineConfig:
    """One kind of device. Without a name nothing is predicted but memory, and nothing refused."""

    name: str | None = None
    """Null = no machine."""
    source: str = ""
    """Where the rates come from; each file says it of each figure."""
    measured: bool = False
    """The GEMM and copy rates were measured on this device."""
    memory_gib: float = 0.0
    """Of one device; host memory of one rank on a CPU."""
    peak_tflops: float = 0.0
    """What utilisation is counted against, dense bf16."""
    gemm_tflops: float = 0.0
    """Reached by large matrix products."""
    expert_gemm_fraction: float = 1.0
    """Of that rate, in the products of single experts."""
    attention_fraction: float = 1.0
    """Of that rate, in softmax attention."""
    memory_gb_per_s: float = 0.0
    """Bytes read and written by a copy."""
    lightning_roofline_fraction: float = 1.0
    """Of that bandwidth, in lightning attention, whose least traffic is 11 tensors."""
    gpus_per_node: int = 1
    intra_node_gb_per_s: float = 0.0
    """Of one device, one direction."""
    intra_node_latency_us: float = 0.0
    inter_node_gb_per_s: float = 0.0
    """Of one device, one direction."""
    inter_node_latency_us: float = 0.0
    workspace_gib: float = 0.0
    """Context, communication buffers and library workspaces of one rank."""
    slack_fraction: float = 0.0
    """Memory that the allocator holds but cannot use, of what is activations."""
    expert_imbalance: float = 1.0
    """Tokens of the busiest expert-parallel rank over the mean."""
    price_per_gpu_hour: float | None = None
    """Null = no cost is printed."""
