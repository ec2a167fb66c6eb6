"""A tokenizer folder's own chat template, rendered to the bytes that `transformers` renders.

The environment is that of huggingface/transformers 5.23, utils/chat_template_utils.py, with one
difference: `strftime_now` is an error, because a shard must not depend on the day it was made.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import orjson
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_pipeline.chat.options import ChatFault
from data_pipeline.config import PipelineError

DEFAULT = "default"
TOOL_USE = "tool_use"
"""Name of the template for conversations with tools, where there is one."""
TOKEN_NAMES = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"),
    "mask_token",
)
"""Variables that a template may use."""
RENDERING_ERRORS = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """What a template renders."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    arguments: dict[str, Any]
    """Further variables."""


class ChatTemplate:
    """Compiled templates by name, and the special tokens they may write."""

    def __init__(self, sources: dict[str, str], tokens: dict[str, str]) -> None:
        """Compile.

        Raises:
            jinja2.TemplateError: a source is no template.
        """
        environment = _environment()
        functions = {"raise_exception": _raise, "strftime_now": _refuse_date}
        self._templates = {
            name: environment.from_string(text, functions) for name, text in sources.items()
        }
        self._tokens = tokens
        self.names_observation = any(
            quoted in text
            for text in sources.values()
            for quoted in ('"observation"', "'observation'")
        )
        """Whether it knows the role `observation`; otherwise its word for it is `tool`."""
        content = orjson.dumps([sources, tokens], option=orjson.OPT_SORT_KEYS)
        self.sha256 = hashlib.sha256(content).hexdigest()

    def render(
        self, conversation: Conversation, num_messages: int, *, add_generation_prompt: bool
    ) -> str:
        """Return the text of the first `num_messages` messages.

        Raises:
            ChatFault: the template raises.
        """
        tools = conversation.tools
        name = TOOL_USE if tools is not None and TOOL_USE in self._templates else DEFAULT
        variables = {**self._tokens, **conversation.arguments}
        try:
            return self._templates[name].render(
                messages=conversation.messages[:num_messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except RENDERING_ERRORS as error:
            raise ChatFault(
                "template", f"cannot be rendered: the chat template says {str(error)!r}"
            ) from None


def read_chat_template(folder: Path) -> ChatTemplate:
    """Return the template of a tokenizer's folder.

    As in transformers, chat_template.jinja goes before the entry of tokenizer_config.json.

    Raises:
        PipelineError: there is none, or it is no template.
    """
    config = _read_config(folder / "tokenizer_config.json")
    tokens = _read_config(folder / "special_tokens_map.json") | config
    sources = _sources(folder, config)
    if DEFAULT not in sources:
        found = f"only {', '.join(sources)}" if sources else "none"
        raise PipelineError(
            f"tokenizer={folder} has no chat template ({found}); give a folder with "
            f"chat_template.jinja, or with a chat_template in tokenizer_config.json"
        )
    try:
        return ChatTemplate(sources, {n: _text(tokens[n]) for n in TOKEN_NAMES if tokens.get(n)})
    except jinja2.TemplateSyntaxError as error:
        raise PipelineError(
            f"tokenizer={folder}: line {error.lineno} of its chat template is no Jinja "
            f"({error.message}); repair it"
        ) from None


def _sources(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    file = folder / "chat_template.jinja"
    if file.is_file():
        further = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        return {DEFAULT: file.read_text("utf-8")} | {p.stem: p.read_text("utf-8") for p in further}
    found = config.get("chat_template") or {}
    if isinstance(found, str):
        return {DEFAULT: found}
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found}
    return found


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise PipelineError(f"{path} is not JSON ({error}); copy it again") from None


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks trained text for others: its body is written as it is."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it a set of the instance

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _refuse_date(form: str) -> None:
    raise jinja2.TemplateError(
        f"strftime_now({form!r}) would make the text depend on the day; give the date in "
        "template_arguments, under the name that the template looks for first"
    )
