r"""Special tokens and chat template of the Ling / Ring 2.0 family.

Layout of a conversation (inclusionAI/Ling-V2, SFT tokenizer), without newlines between turns:

    <role>SYSTEM</role>{system}\ndetailed thinking {on|off}<|role_end|>
    <role>HUMAN</role>{user}<|role_end|><role>ASSISTANT</role>{answer}<|role_end|>

The template is ours, written from that description; exported folders whose tokenizer has none get
it as ring_train/hf/modeling/chat_template.jinja.
"""

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
"""Ends a document in pretraining; also the padding token."""
ROLE_END = "<|role_end|>"

CONTROL_TOKENS = (BOS, EOS, ROLE_END, "<role>", "</role>")
"""Never produced by encoding text that happens to contain them."""
TEXT_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
"""Single tokens that stay visible when control tokens are skipped in decoding."""

CHAT_TEMPLATE = r"""
{%- set thinking = 'on' if enable_thinking is defined and enable_thinking else 'off' -%}
{%- set state = namespace(last_query=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set state.last_query = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- '<role>SYSTEM</role>' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\n' -}}{%- endif -%}
{%- if tools -%}
  {{- '# Tools\n\nYou may call functions. Their signatures, within <tools></tools>:\n<tools>' -}}
  {%- for tool in tools -%}{{- '\n' + tool | tojson -}}{%- endfor -%}
  {{- '\n</tools>\n\nFor each call, return within <tool_call></tool_call> a JSON object:\n' -}}
  {{- '{"name": <function-name>, "arguments": <arguments-object>}\n' -}}
{%- endif -%}
{{- 'detailed thinking ' + thinking + '<|role_end|>' -}}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{- '<role>HUMAN</role>' + message.content + '<|role_end|>' -}}
  {%- elif message.role == 'system' -%}
    {%- if not loop.first -%}
      {{- '<role>SYSTEM</role>' + message.content + '<|role_end|>' -}}
    {%- endif -%}
  {%- elif message.role == 'assistant' -%}
    {%- set content = message.content or '' -%}
    {%- set reasoning = message.reasoning_content or '' -%}
    {%- if not reasoning and '</think>' in content -%}
      {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] -%}
      {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<role>ASSISTANT</role>' -}}
    {%- if reasoning and loop.index0 > state.last_query -%}
      {{- '\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') -}}
    {%- else -%}
      {{- content -}}
    {%- endif -%}
    {%- for call in message.tool_calls or [] -%}
      {%- set function = call.function or call -%}
      {%- if content or not loop.first -%}{{- '\n' -}}{%- endif -%}
      {{- '<tool_call>\n{"name": "' + function.name + '", "arguments": ' -}}
      {%- if function.arguments is string -%}
        {{- function.arguments -}}
      {%- else -%}
        {{- function.arguments | tojson -}}
      {%- endif -%}
      {{- '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|role_end|>' -}}
  {%- elif message.role == 'tool' -%}
    {%- if loop.first or loop.previtem.role != 'tool' -%}
      {{- '<role>OBSERVATION</role>' -}}
    {%- endif -%}
    {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|role_end|>' -}}{%- endif -%}
  {%- else -%}
    {{- raise_exception('role ' ~ message.role ~ ' is not system, user, assistant or tool') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<role>ASSISTANT</role>' -}}{%- endif -%}
""".strip()
