"""Shapes of chat templates, each with a tokenizer folder, and runs of tokenization on them."""

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from data_pipeline.chat.encoder import ChatEncoder, open_chat_encoder
from data_pipeline.chat.options import ChatOptions
from data_pipeline.special_tokens import CHAT_TEMPLATE
from data_pipeline.tokenize import Tokenize, tokenize
from data_pipeline.train_tokenizer import TrainTokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[4]
LING = ROOT.parent / "shared/tokenizer/ling_chat/tokenizer_config.json"
"""The released Ling 2.0 template; it is not part of this repository."""

CHATML = """\
{% for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
STRIPPED = """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and not loop.last and '</think>' in content %}
        {%- set content = content.split('</think>')[-1] %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '<|sep|>' + content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|sep|>' }}{%- endif %}
"""
OPENED = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}
"""
FORGETFUL = STRIPPED.replace("not loop.last and", "")
"""Leaves reasoning out even of the last turn."""

SHAPES = {
    "demo": ((Path(__file__).parent / "without_tools.jinja").read_text(), "<|role_end|>"),
    "ours": (CHAT_TEMPLATE, "<|role_end|>"),
    "chatml": (CHATML, "<|im_end|>"),
    "llama": (LLAMA, "<|eot_id|>"),
    "stripped": (STRIPPED, "<|im_end|>"),
    "opened": (OPENED, "<|im_end|>"),
    "forgetful": (FORGETFUL, "<|im_end|>"),
}
"""Name -> template, and the token that ends a turn."""
FURTHER_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|sep|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
NUM_TOKENS = 340


def write_shapes(root: Path) -> dict[str, Path]:
    """Return shape -> folder; their merges join newlines, as those of real vocabularies do."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abc 12\n", k=rng.randrange(2, 6))) for _ in range(300)]
    texts = ["\n\n".join(rng.choices(words, k=30)) for _ in range(300)]
    records = [{"id": str(n), "text": text, "domain": "d"} for n, text in enumerate(texts)]
    write_lines(root / "text.jsonl", records)
    base = root / "base"
    arguments = {"input": str(root / "text.jsonl"), "output": str(base)}
    train_tokenizer(TrainTokenizer(vocab_size=NUM_TOKENS, **arguments))
    return {name: write_shape(base, root / name, text) for name, (text, _) in SHAPES.items()}


def write_shape(base: Path, folder: Path, template: str) -> Path:
    """Return a folder with the tokenizer of `base`, the tokens of all shapes and a template."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in FURTHER_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def encoder_of(folder: Path, **options: Any) -> ChatEncoder:
    return open_chat_encoder(folder, ChatOptions(**options))


def messages_of(*contents: str, system: str = "") -> list[dict[str, Any]]:
    """Return user and assistant by turns."""
    first = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return first + [{"role": roles[n % 2], "content": c} for n, c in enumerate(contents)]


def write_lines(path: Path, records: list[Any]) -> None:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(line + "\n" for line in lines))


def run(source: Path, folder: Path, prefix: Path, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"input": str(source), "tokenizer": str(folder), "format": "chat"}
    tokenize(Tokenize(output=str(prefix), **(arguments | changes)))
    return json.loads(Path(f"{prefix}.json").read_text())
