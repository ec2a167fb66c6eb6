"""What vLLM's settings must be for this model; vLLM calls it before it starts any worker."""

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ring_linear_vllm.config import config_problems

logger = init_logger(f"vllm.{__name__}")


class RingLinearRules(VerifyAndUpdateConfig):
    """Refuses what would give other probabilities than training; sets what has one right value."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check the model and the settings; fp32 state, no prefix caching.

        Raises:
            ValueError: everything that is wrong, at once.
        """
        config = vllm_config.model_config.hf_config
        problems = config_problems(config) or _parallel_problems(vllm_config)
        cache = vllm_config.cache_config
        if cache.mamba_cache_dtype not in ("auto", "float32"):
            problems.append(
                f"--mamba-cache-dtype {cache.mamba_cache_dtype}: the state of linear attention "
                "sums over all tokens and drifts in 16 bits; leave it out, or give float32"
            )
        if vllm_config.speculative_config is not None:
            problems.append(
                "--speculative-config: speculative decoding is not implemented for this model; "
                "leave it out"
            )
        if problems:
            raise ValueError("; ".join(problems))
        cache.mamba_cache_dtype = "float32"
        if cache.enable_prefix_caching:
            logger.info(
                "Prefix caching is off: the state of linear attention is kept in fp32 once "
                "per sequence, not at block boundaries"
            )
            cache.enable_prefix_caching = False


def _parallel_problems(vllm_config: VllmConfig) -> list[str]:
    """Return why the heads cannot be divided; the config is known to be whole."""
    config = vllm_config.model_config.hf_config
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    norms = config.group_norm_size
    if norms % tp_size == 0:
        return []
    sizes = [size for size in range(1, norms + 1) if norms % size == 0]
    return [
        f"--tensor-parallel-size {tp_size} does not divide group_norm_size={norms}: a rank would "
        f"normalise part of a group; choose from {sizes}"
    ]
