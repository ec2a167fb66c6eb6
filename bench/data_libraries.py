"""One library on one corpus: `python bench/data_libraries.py LIBRARY CORPUS TOKENIZER`.

Prints the tokens it made and, for bare encoders, the CPU-seconds of encoding alone.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BATCH_DOCUMENTS = 512
EOS = "<|endoftext|>"


def batches(corpus: str) -> Iterator[list[str]]:
    """Yield texts of a JSONL file."""
    texts: list[str] = []
    with Path(corpus).open("rb") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            if len(texts) == BATCH_DOCUMENTS:
                yield texts
                texts = []
    if texts:
        yield texts


def time_encoding(corpus: str, encode: Callable[[list[str]], int]) -> dict[str, Any]:
    """Return tokens (with one end of text a document) and CPU-seconds of `encode` alone."""
    tokens = 0
    cpu_s = 0.0
    for texts in batches(corpus):
        start_s = time.process_time()
        count = encode(texts)
        cpu_s += time.process_time() - start_s
        tokens += count + len(texts)
    return {"tokens": tokens, "encode_cpu_s": cpu_s}


def run_gigatoken(corpus: str, tokenizer: str) -> dict[str, Any]:
    """Encode text by text."""
    import gigatoken

    encode = gigatoken.Tokenizer(tokenizer).encode
    return time_encoding(corpus, lambda texts: sum(len(encode(text)) for text in texts))


def run_gigatoken_batch(corpus: str, tokenizer: str) -> dict[str, Any]:
    """Encode in batches, on one thread, as its documentation advises."""
    import awkward
    import gigatoken

    encoder = gigatoken.Tokenizer(tokenizer)
    return time_encoding(
        corpus, lambda texts: int(awkward.count(encoder.encode_batch(texts, parallel=False)))
    )


def run_tokenizers(corpus: str, tokenizer: str) -> dict[str, Any]:
    """Encode in batches on one thread."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")

    def encode(texts: list[str]) -> int:
        found = encoder.encode_batch_fast(texts, add_special_tokens=False)
        return sum(len(encoding.ids) for encoding in found)

    return time_encoding(corpus, encode)


def run_datasets(corpus: str, tokenizer: str) -> dict[str, Any]:
    """Map a dataset over two processes into an Arrow file."""
    import datasets
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    eos = encoder.token_to_id(EOS)

    def encode(columns: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = encoder.encode_batch_fast(columns["text"], add_special_tokens=False)
        return {"ids": [[*encoding.ids, eos] for encoding in found]}

    with tempfile.TemporaryDirectory() as cache:
        loaded = datasets.load_dataset("json", data_files=corpus, split="train", cache_dir=cache)
        mapped = loaded.map(
            encode, batched=True, batch_size=256, num_proc=2, remove_columns=loaded.column_names
        )
        return {"tokens": sum(len(row["ids"]) for row in mapped)}


def run_datatrove(corpus: str, tokenizer: str) -> dict[str, Any]:
    """Read and tokenize with datatrove, one task, nothing shuffled."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    path = Path(corpus)
    with tempfile.TemporaryDirectory() as folder:
        steps = [
            JsonlReader(str(path.parent), glob_pattern=path.name),
            DocumentTokenizer(
                f"{folder}/out",
                f"{tokenizer}/tokenizer.json",
                local_working_dir=None,
                eos_token=EOS,
                shuffle_documents=False,
            ),
        ]
        executor = LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=f"{folder}/log")
        executor.run()
        written = sum(file.stat().st_size for file in Path(folder, "out").rglob("*.ds"))
        vocabulary = json.loads(Path(tokenizer, "tokenizer.json").read_text())["model"]["vocab"]
        return {"tokens": written // (2 if len(vocabulary) < 2**16 else 4)}


if __name__ == "__main__":
    library, corpus, tokenizer = sys.argv[1:]
    found = globals()[f"run_{library}"](corpus, tokenizer)
    print(json.dumps(found))
