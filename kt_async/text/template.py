"""Chat messages to prompt text, through the model's own Jinja template in a sandbox.

Behaves as Hugging Face's apply_chat_template: trim_blocks, lstrip_blocks, loop controls, tojson
without ASCII escapes, raise_exception, strftime_now and the generation block. A template comes
with the model and is therefore untrusted: it runs in jinja2's immutable sandbox.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kt_async.errors import ConfigError, RequestError
from kt_async.text.hf_files import read_json, token_name
from kt_async.text.tokenizer import HasMetadata

_log = logging.getLogger(__name__)

CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)

# What a template can do wrong with the messages it gets; anything else is a bug of ours.
_RENDER_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks training targets; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes <, > and & for HTML, which models never saw."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # the output is a prompt, not a page
        extensions=[loopcontrols, _GenerationBlock],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A compiled template. Rendering may happen on any thread."""

    def __init__(
        self,
        sources: Mapping[str, str],
        *,
        bos_token: str = "",
        eos_token: str = "",
        origin: str = "chat template",
    ) -> None:
        """sources: "default" and, for models that have one, "tool_use", which is taken when a
        request brings tools. Raises ConfigError naming `origin` when one does not compile."""
        self.sources = dict(sources)
        self._fixed = {"bos_token": bos_token, "eos_token": eos_token}
        environment = _environment()
        try:
            self._templates = {
                name: environment.from_string(source) for name, source in sources.items()
            }
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            where = f" (line {line})" if line else ""
            raise ConfigError(f"{origin}: the chat template is wrong{where}: {error}.") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Return the prompt text.

        kwargs: further variables for the template (tools, documents, enable_thinking ...).
        Raises RequestError 400 with the template's own message when it refuses the messages.
        """
        chosen = "tool_use" if kwargs.get("tools") and "tool_use" in self._templates else "default"
        variables = {"tools": None, "documents": None, **self._fixed, **kwargs}
        try:
            return self._templates[chosen].render(
                messages=messages, add_generation_prompt=add_generation_prompt, **variables
            )
        except _RENDER_ERRORS as error:
            raise RequestError(
                400,
                f"the model's chat template refuses the messages: {error}",
                code="chat_template_error",
                param="messages",
            ) from None


class HasVocabulary(Protocol):
    """What this needs of text.tokenizer.Tokenizer."""

    bos_id: int | None

    def token_text(self, token: int, /) -> str: ...


def load_template(
    files: HasMetadata,
    tokenizer: HasVocabulary,
    model_path: Path | None = None,
    template_file: Path | None = None,
) -> ChatTemplate:
    """Find the chat template: a file, then the --model_path directory, then the GGUF itself.

    Without any the ChatML form is used and a warning says so. Raises ConfigError.
    """
    names = _token_names(files, tokenizer, model_path)
    if template_file is not None:
        return ChatTemplate({"default": _read(template_file)}, origin=str(template_file), **names)
    if model_path is not None:
        found = _from_directory(model_path)
        if found:
            return ChatTemplate(found, origin=str(model_path), **names)
    found = _from_metadata(files.metadata)
    if not found:
        _log.warning("%s: holds no chat template; using ChatML", files.path)
        found = {"default": CHATML}
    return ChatTemplate(found, origin=str(files.path), **names)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from None


def _from_directory(folder: Path) -> dict[str, str]:
    """Return the templates of a Hugging Face directory, {} when it has none."""
    plain = folder / "chat_template.jinja"
    if plain.exists():
        return {"default": _read(plain)}
    value = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        named = {str(item.get("name")): str(item.get("template")) for item in value}
        return _with_default(named)
    return {}


def _from_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    found = {
        key.removeprefix(prefix).removeprefix(".") or "default": value
        for key, value in metadata.items()
        if (key == prefix or key.startswith(f"{prefix}.")) and isinstance(value, str) and value
    }
    return _with_default(found)


def _with_default(found: dict[str, str]) -> dict[str, str]:
    """Make any template the default one when none is called that."""
    if found and "default" not in found:
        found["default"] = next(iter(found.values()))
    return found


def _token_names(
    files: HasMetadata, tokenizer: HasVocabulary, model_path: Path | None
) -> dict[str, str]:
    """Return bos_token and eos_token as templates expect them; "" when the model has none."""
    config = read_json(model_path / "tokenizer_config.json") if model_path else {}
    eos = files.metadata.get("tokenizer.ggml.eos_token_id")
    eos_text = tokenizer.token_text(eos) if isinstance(eos, int) else ""
    bos_text = "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id)
    return {
        "bos_token": token_name(config.get("bos_token")) or bos_text,
        "eos_token": token_name(config.get("eos_token")) or eos_text,
    }
