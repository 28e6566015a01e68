"""The chat template that goes with the tokenizers that dsv3 trains: DeepSeek's format, without tools.

    <bos>system<｜User｜>question<｜Assistant｜>answer<eos><｜User｜>...

Reasoning, `<think>...</think>` before the answer or `reasoning_content`, stays in what is said after the last question; in
earlier turns it is left out, as DeepSeek's own template does it.
"""

DEFAULT_CHAT_TEMPLATE = """\
{%- set seen = namespace(system='', question=-1) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' and loop.first -%}
    {%- set seen.system = message['content'] -%}
  {%- elif message['role'] == 'user' -%}
    {%- set seen.question = loop.index0 -%}
  {%- elif message['role'] != 'assistant' or message['tool_calls'] -%}
    {{- raise_exception('there is no place for tools, nor for a message of role ' + message['role']) -}}
  {%- endif -%}
{%- endfor -%}
{{- bos_token + seen.system -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- '<｜User｜>' + message['content'] -}}
  {%- elif message['role'] == 'assistant' and loop.index0 < seen.question -%}
    {{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token -}}
  {%- elif message['role'] == 'assistant' and message['reasoning_content'] -%}
    {{- '<｜Assistant｜><think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' + message['content'] + eos_token -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '<｜Assistant｜>' + message['content'] + eos_token -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<｜Assistant｜>' -}}
{%- endif -%}
"""
