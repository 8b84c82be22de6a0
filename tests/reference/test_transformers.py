"""Chat templates and configs against the transformers package."""

from __future__ import annotations

import math

import pytest
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from kt_async.model.hf_config import spec_from_hf
from kt_async.model.tensors import expected_tensors
from kt_async.text.template import CHATML, ChatTemplate

# What a Qwen3 template does with tools, thinking and tool calls, in short.
TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and ns.last < 0 %}{% set ns.last = index %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') if message.content is
        string else '' %}
    {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + (call.function.arguments | tojson) + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

BREAK = """{% for m in messages %}
  {% if loop.index > 1 %}
    {% break %}
  {% endif %}
{{ m.content }}
{% endfor %}"""
CONTINUE = """{% for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}
{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"""
DIALECT = [
    TOOLS,
    CHATML,
    BREAK,
    CONTINUE,
    "{{ bos_token }}{{ messages | tojson(indent=2) }}{{ eos_token }}",
    "{{ messages[0].get('name', 'nobody') | upper }}{{ tools is none }}{{ documents is none }}",
    "  {#- comment -#}  {{ 'a' ~ 1 }}   \n{% set x = [1, 2] %}\n{{ x | join(',') }}",
]


@pytest.mark.parametrize("source", DIALECT)
def test_same_text_as_the_transformers_package(source: str) -> None:
    messages = [
        {"role": "system", "content": "Söme <b>rules</b> & 'quotes'"},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "<think>\nhm\n</think>\n\nyes",
            "tool_calls": [{"function": {"name": "f", "arguments": {"ü": [1, None, True]}}}],
        },
        {"role": "user", "content": "and?"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": "<é>"}}}]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for extra in ({}, {"tools": tools}, {"enable_thinking": False}):
        theirs, _ = render_jinja_template(
            conversations=[messages],
            chat_template=source,
            add_generation_prompt=True,
            **{"tools": None, **extra},
            **names,
        )
        assert ChatTemplate({"default": source}, **names).render(messages, **extra) == theirs[0]


def test_configs_of_the_transformers_package() -> None:
    qwen3 = transformers.Qwen3MoeConfig().to_dict()
    assert spec_from_hf(qwen3).num_experts == 128
    qwen2 = spec_from_hf(transformers.Qwen2MoeConfig().to_dict())
    assert (qwen2.qkv_bias, qwen2.shared_intermediate_size) == (True, 5632)
    v3 = spec_from_hf(transformers.DeepseekV3Config().to_dict())
    assert (v3.scoring, v3.expert_groups, v3.expert_groups_used) == ("sigmoid", 8, 4)
    assert (v3.head_dim, v3.v_head_dim, v3.q_lora_rank) == (192, 128, 1536)
    assert sum(math.prod(shape) for shape in expected_tensors(v3).values()) == 671_026_419_200
    v2 = spec_from_hf(transformers.DeepseekV2Config(num_experts_per_tok=6).to_dict())
    assert (v2.scoring, v2.norm_topk, v2.expert_groups) == ("softmax", False, 0)
