"""A vLLM engine for scoring, and log-probabilities from its prefill and from its decoding."""

from typing import Any

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory

from ring_linear_vllm.forcing import FORCED_TOKENS, ForcedTokens


def build_engine(
    model: str,
    *,
    max_tokens: int,
    chunk_tokens: int | None = None,
    dtype: str = "float32",
    tensor_parallel_size: int = 1,
    trust_remote_code: bool = False,
    **settings: Any,
) -> LLM:
    """Return an engine that computes what it is asked for without compiling or caching prefixes.

    Args:
        model: Hugging Face folder.
        max_tokens: longest sequence.
        chunk_tokens: most tokens in a step, of all sequences together; None = whole prompts.
        dtype: what the model computes in.
        tensor_parallel_size: ranks.
        trust_remote_code: whether the config class in the folder may run.
        settings: other arguments of vllm.LLM.
    """
    num_seqs = settings.pop("max_num_seqs", 8)
    return LLM(
        model,
        dtype=dtype,
        max_model_len=max_tokens,
        max_num_batched_tokens=chunk_tokens or num_seqs * max_tokens,
        max_num_seqs=min(num_seqs, chunk_tokens or num_seqs),
        tensor_parallel_size=tensor_parallel_size,
        trust_remote_code=trust_remote_code,
        enforce_eager=True,
        enable_prefix_caching=False,
        logits_processors=[ForcedTokens],
        **settings,
    )


def close_engine(engine: LLM) -> None:
    """End an engine that runs in this process, so that another can start here."""
    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def prompt_logprobs(engine: LLM, prompts: list[list[int]]) -> list[list[float]]:
    """Return log p(ids[t+1] | ids[..t]) of each prompt as the prefill computes it."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = engine.generate(_inputs(prompts), params, use_tqdm=False)
    return [
        [
            places[token].logprob
            for places, token in zip(out.prompt_logprobs[1:], ids[1:], strict=True)
        ]
        for out, ids in zip(outputs, prompts, strict=True)
    ]


def decode_logprobs(engine: LLM, prompts: list[list[int]]) -> list[list[float]]:
    """Return the same when the first token is the prompt and the others are generated."""
    params = [
        SamplingParams(
            max_tokens=len(ids) - 1,
            temperature=0.0,
            logprobs=0,
            ignore_eos=True,
            detokenize=False,
            extra_args={FORCED_TOKENS: ids[1:]},
        )
        for ids in prompts
    ]
    outputs = engine.generate(_inputs([ids[:1] for ids in prompts]), params, use_tqdm=False)
    return [
        [
            places[token].logprob
            for places, token in zip(out.outputs[0].logprobs, ids[1:], strict=True)
        ]
        for out, ids in zip(outputs, prompts, strict=True)
    ]


def _inputs(prompts: list[list[int]]) -> list[TokensPrompt]:
    return [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
