"""Log-probabilities of given tokens in vLLM.

`python -m ring_linear_vllm.score --model DIR --prompts FILE --output FILE` reads
{"prompts": [[ids]]} and writes {"logprobs": [[log p(ids[t+1] | ids[..t])]]}, the forms of
`ring_train.jobs.score`. All prompts are one batch. By default each goes in one pass;
`--chunk-tokens N` prefills N tokens a step, `--decode` generates all but the first token.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(words: list[str]) -> int:
    """Score the prompts of a file; return the exit status."""
    args = _parser().parse_args(words)
    try:
        prompts = read_prompts(args.prompts)
        if args.output.is_dir() or not args.output.parent.is_dir():
            raise ValueError(f"--output {args.output}: name a file in a folder that exists")
        logprobs = score(args, prompts)
    except (ValueError, OSError, RuntimeError) as error:  # what vLLM raises for bad folders
        print(error, file=sys.stderr)
        return 1
    partial = args.output.with_name(args.output.name + ".partial")
    partial.write_text(json.dumps({"logprobs": logprobs}))
    os.replace(partial, args.output)
    return 0


def score(args: argparse.Namespace, prompts: list[list[int]]) -> list[list[float]]:
    """Return the log-probabilities of the prompts.

    Raises:
        ValueError, OSError, RuntimeError: the model or the settings cannot be served.
    """
    set_environment(args.tensor_parallel_size)
    from ring_linear_vllm.engine import build_engine, decode_logprobs, prompt_logprobs

    engine = build_engine(
        args.model,
        max_tokens=max(map(len, prompts)) + 1,
        chunk_tokens=args.chunk_tokens,
        dtype=args.dtype,
        tensor_parallel_size=args.tensor_parallel_size,
        trust_remote_code=args.trust_remote_code,
    )
    return (decode_logprobs if args.decode else prompt_logprobs)(engine, prompts)


def set_environment(tensor_parallel_size: int) -> None:
    """Ask vLLM for no reports of usage, no compilation, and one process where one is enough.

    CPU threads are left to the system: by default vLLM wants a NUMA node for each rank.

    Has an effect only before vLLM is imported; what the environment says already is kept.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if tensor_parallel_size == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ring_linear_vllm.score", description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--prompts", required=True, type=Path, help='{"prompts": [[ids]]}')
    parser.add_argument("--output", required=True, type=Path, help='{"logprobs": [[...]]}')
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--chunk-tokens", type=int, help="prefill so many tokens a step")
    how.add_argument("--decode", action="store_true", help="generate all but the first token")
    parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the config class in the folder; only the softmax families need it",
    )
    return parser


def read_prompts(path: Path) -> list[list[int]]:
    """Return the prompts of a file.

    Raises:
        ValueError: it is not readable, or a prompt has nothing to predict.
    """
    form = 'give a JSON file {"prompts": [[ids]]}'
    try:
        prompts: Any = json.loads(path.read_text())["prompts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--prompts {path}: {type(error).__name__}: {error}; {form}") from error
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"--prompts {path}: no list of prompts; {form}")
    for prompt in prompts:
        if not isinstance(prompt, list) or len(prompt) < 2:
            raise ValueError(f"--prompts {path}: {prompt} has fewer than two tokens; {form}")
        if not all(type(token) is int and token >= 0 for token in prompt):
            raise ValueError(f"--prompts {path}: {prompt} are no token ids; {form}")
    return prompts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
