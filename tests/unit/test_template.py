"""Chat templates: Hugging Face's dialect, the sandbox, and where a template comes from."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kt_async.errors import ConfigError, RequestError
from kt_async.text.template import CHATML, ChatTemplate, load_template

USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages: Any = USER, **kwargs: Any) -> str:
    return ChatTemplate({"default": source}).render(messages, **kwargs)


def test_chatml() -> None:
    messages = [{"role": "system", "content": "Be kind."}, *USER]
    expected = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert render(CHATML, messages, add_generation_prompt=False) == expected
    assert render(CHATML, messages) == expected + "<|im_start|>assistant\n"


def test_templates_own_refusal_reaches_the_client() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.nothing.more }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[5].role }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(999999999) %}{% endfor %}",
    ],
)
def test_mistakes_and_escapes_are_refused(source: str) -> None:
    messages = [dict(USER[0])]
    with pytest.raises(RequestError):
        render(source, messages)
    assert messages == USER


def test_strftime_now_gives_a_date() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", render("{{ strftime_now('%Y-%m-%d') }}"))


def test_wrong_template_is_named_at_start(tmp_path: Path) -> None:
    path = tmp_path / "bad.jinja"
    path.write_text("line\n{% if %}")
    with pytest.raises(ConfigError, match=r"bad\.jinja: the chat template is wrong \(line 2\)"):
        load_template(files(), VOCABULARY, template_file=path)
    with pytest.raises(ConfigError, match=r"none\.jinja: cannot be read"):
        load_template(files(), VOCABULARY, template_file=tmp_path / "none.jinja")


# ---- where a template comes from ----

VOCABULARY: Any = SimpleNamespace(bos_id=1, token_text=lambda token: f"<{token}>")


def files(**keys: Any) -> Any:
    metadata = {f"tokenizer.{key.replace('__', '.')}": value for key, value in keys.items()}
    return SimpleNamespace(metadata=metadata, path=Path("m.gguf"))


def test_precedence(tmp_path: Path) -> None:
    gguf = files(chat_template="gguf")
    assert load_template(gguf, VOCABULARY).render(USER) == "gguf"
    assert load_template(gguf, VOCABULARY, tmp_path).render(USER) == "gguf"
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "config"}))
    assert load_template(gguf, VOCABULARY, tmp_path).render(USER) == "config"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert load_template(gguf, VOCABULARY, tmp_path).render(USER) == "jinja"
    own = tmp_path / "own.txt"
    own.write_text("own")
    assert load_template(gguf, VOCABULARY, tmp_path, own).render(USER) == "own"


def test_without_any_chatml_is_used_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        template = load_template(files(), VOCABULARY)
    assert "m.gguf: holds no chat template; using ChatML" in caplog.text
    assert template.render(USER) == render(CHATML)


def test_tool_template_is_taken_when_tools_come(tmp_path: Path) -> None:
    gguf = load_template(files(chat_template="plain", chat_template__tool_use="tools"), VOCABULARY)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    for template in (gguf, load_template(files(), VOCABULARY, tmp_path)):
        assert template.render(USER) == "plain"
        assert template.render(USER, tools=[]) == "plain"
        assert template.render(USER, tools=[{}]) == "tools"


def test_token_names(tmp_path: Path) -> None:
    source = "{{ bos_token }}|{{ eos_token }}"
    gguf = files(chat_template=source, ggml__eos_token_id=2)
    assert load_template(gguf, VOCABULARY).render(USER) == "<1>|<2>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "B"}}))
    assert load_template(gguf, VOCABULARY, tmp_path).render(USER) == "B|<2>"
    nothing: Any = SimpleNamespace(bos_id=None, token_text=lambda token: "")
    assert load_template(files(chat_template=source), nothing).render(USER) == "|"
