"""Chat templates, each with what is particular of a family's own, and tokenizers that have them."""

import json
import shutil
from functools import cache
from pathlib import Path

from speechlm2_jax.data.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
TAG = "<|audioplaceholder|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{%- endif %}" + CHATML
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0].role == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date_string + "\n\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception(
'System role not supported') }}{% endif %}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception(
'Roles must alternate') }}{% endif %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}
{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
OTHER_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '</s>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = """{%- set ns = namespace(last=0) %}
{%- for message in messages[::-1] %}
    {%- if ns.last == 0 and message.role == "user" %}
        {%- set ns.last = messages|length - loop.index0 - 1 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {%- set content = '<think>\\n' + thought + '\\n</think>\\n\\n' + content %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
OPENS_A_THOUGHT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + "
    "m.content.split('</think>')[-1] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
WHOLE_TURNS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Its tags hold the header of a response too, as NeMo's format qwen learns it."""
TAGGED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>%s\n%s<|im_end|>\n' % (m.role, m['content']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
)
MANY_STEPS = """{%- macro turn(role, text='') -%}
{{ '<|im_start|>' ~ role ~ '\n' }}{{ text }}{{ '<|im_end|>' }}
{%- endmacro %}
{%- set roles = messages | map(attribute='role') | unique | list %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{{- {'roles': roles, 'é': [1, none, true], 'n': users | length} | tojson(indent=2) }}
{%- for message in messages recursive %}
    {%- if loop.index > 90 %}{% break %}{% endif %}
    {{- turn(message.role, text=message['content'].replace('  ', ' ')) }}
    {%- set parts = message.content.split(' ') %}
    {%- if not loop.last %}{{ loop.cycle('', '-') }}{% continue %}{% endif %}
    {{- parts[:2] | join('+') | indent(2) | upper }}
    {{- '{}/{x}'.format(parts | first, x=parts | last) }}
    {{- dict(a=1, **{'b': 2}).items() | list }}
    {{- ('%02d' | format(7), 7 ** 2, 7 // 2, -7, 'a' in 'abc', parts is iterable) }}
    {{- range(3) | sum ~ (parts | sort | reverse | list)[0] ~ tools ~ nothing }}
{%- endfor %}
{%- filter trim %}  {% if add_generation_prompt %}<|im_start|>{% endif %}  {% endfilter %}"""

WITH_SYSTEM = {"CHATML", "DEFAULT_SYSTEM", "LLAMA3", "PHI3", "THINKING", "TAGGED"}


@cache
def _source(kind: str) -> tuple[dict, Path]:
    folder = DATA / kind
    return json.loads((folder / "tokenizer_config.json").read_text()), folder / "tokenizer.json"


def tokenizer_with(
    template: str, folder: Path, kind: str = "prompts/tok_bpe", **settings
) -> Tokenizer:
    """A tokenizer of the goldens with a chat template; its directory is `folder`."""
    config, tokens = _source(kind)
    folder.mkdir(exist_ok=True)
    shutil.copy(tokens, folder / "tokenizer.json")
    written = {**config, "chat_template": template, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return Tokenizer(folder)
