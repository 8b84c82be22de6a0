"""Request bodies: bytes -> checked structs, or a 400 that names the field, its value and the limit.

Pure functions, called on the event loop by `api.openai`. Every field is honoured, refused by name,
or one of the few that change nothing about the answer (`user`, `metadata`, ...). What needs the
tokenizer or the model's limits is checked in `api.prepare`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import orjson

from kt_async.api.bodies import (
    MAX_BIAS,
    MAX_STOP_CHARS,
    MAX_STOPS,
    Body,
    ChatBody,
    CompletionBody,
    Message,
    TextPart,
)
from kt_async.errors import RequestError

AnyBody = TypeVar("AnyBody", ChatBody, CompletionBody)

_REFUSED = (
    "structured_outputs",
    "grammar",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "tools",
    "functions",
    "audio",
    "prediction",
    "reasoning_effort",
    "verbosity",
    "web_search_options",
    "suffix",
)
_WHERE = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")


def invalid(message: str, param: str | None, code: str | None = "invalid_value") -> RequestError:
    """Return the 400 for a field."""
    return RequestError(400, message, code=code, param=param)


def unsupported(param: str, what: str | None = None) -> RequestError:
    """Return the 400 for a field that this server knows but does not serve."""
    return invalid(f"{param}: {what or 'not supported by this server'}", param, "unsupported_value")


class BodyParser:
    """Decoder for one kind of body."""

    def __init__(self, kind: type[AnyBody]) -> None:
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(kind)
        self._fields = kind.__struct_fields__

    def parse(self, data: bytes) -> Any:
        """Return the checked struct. Raises RequestError 400."""
        try:
            body = self._decoder.decode(data)
        except msgspec.ValidationError as err:
            raise self._explain(str(err), data) from None
        except UnicodeDecodeError as err:
            raise invalid(
                f"the body is not valid UTF-8: {err.reason}", None, "invalid_json"
            ) from None
        except msgspec.DecodeError as err:
            raise invalid(f"the body is not valid JSON: {err}", None, "invalid_json") from None
        except RecursionError:
            raise invalid("the body is nested too deeply", None, "invalid_json") from None
        _check_common(body)
        return body

    def _explain(self, message: str, data: bytes) -> RequestError:
        where = _WHERE.search(message)
        param = where[1] if where else ""
        text = message[: where.start()] if where else message
        prefix = f"{param}." if param else ""
        if unknown := _UNKNOWN.fullmatch(text):
            name = unknown[1]
            near = [] if param else difflib.get_close_matches(name, self._fields, 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            return invalid(
                f"unknown field '{prefix}{name[:80]}'{hint}", prefix + name[:80], "unknown_field"
            )
        if missing := _MISSING.fullmatch(text):
            return invalid(f"{prefix}{missing[1]}: missing", prefix + missing[1], "missing_field")
        text = text[0].lower() + text[1:].replace("`", "")
        if not param:
            return invalid(f"the body: {text}", None)
        return invalid(f"{param}: {text}{_value_at(data, param)}", param)


def _value_at(data: bytes, path: str) -> str:
    """Return ', got <value>' for a short scalar at the path, else nothing."""
    try:
        value = orjson.loads(data)
        for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
            value = value[int(index)] if index else value[name]
    except (ValueError, KeyError, IndexError, TypeError):  # '[...]' stands for any key
        return ""
    if isinstance(value, (dict, list)):
        return f", got length {len(value)}"
    text = repr(value)
    return f" (the value is {text if len(text) <= 60 else text[:57] + '...'})"


def _check_common(body: Body) -> None:
    for name in _REFUSED:
        if getattr(body, name, None) not in (None, [], {}, ""):
            raise unsupported(name)
    if body.response_format is not None and body.response_format.type != "text":
        raise unsupported(
            "response_format", f"only type 'text' is supported, not '{body.response_format.type}'"
        )
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options: only allowed with stream = true", "stream_options")
    both = body.repetition_penalty, body.repeat_penalty
    if None not in both and both[0] != both[1]:
        raise invalid("repeat_penalty: contradicts repetition_penalty", "repeat_penalty")
    if isinstance(body, ChatBody):
        _check_chat(body)
    elif isinstance(body, CompletionBody) and body.best_of not in (None, body.n or 1):
        raise unsupported("best_of", f"must equal n = {body.n or 1}, got {body.best_of}")


def _check_chat(body: ChatBody) -> None:
    for name in ("tool_choice", "function_call"):
        if getattr(body, name) not in (None, "none"):
            raise unsupported(name)
    if body.modalities not in (None, ["text"]):
        raise unsupported("modalities", "only ['text'] is supported")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs: only allowed with logprobs = true", "top_logprobs")
    for name in ("max_tokens", "max_completion_tokens"):
        if getattr(body, name) == 0:
            raise invalid(f"{name}: must be at least 1, got 0", name)
    both = body.max_tokens, body.max_completion_tokens
    if None not in both and both[0] != both[1]:
        raise invalid("max_tokens: contradicts max_completion_tokens", "max_tokens")
    for pos, message in enumerate(body.messages):
        _check_message(message, f"messages[{pos}]")


def _check_message(message: Message, where: str) -> None:
    if isinstance(message.content, list):
        for pos, part in enumerate(message.content):
            if not isinstance(part, TextPart):
                kind = part.__struct_config__.tag
                raise unsupported(
                    f"{where}.content[{pos}]",
                    f"parts of type '{kind}' are not supported, the model reads text only",
                )
    for name in ("audio", "function_call"):
        if getattr(message, name):
            raise unsupported(f"{where}.{name}")
    instead = (message.refusal, message.reasoning_content, message.tool_calls)
    if message.content is None and (message.role != "assistant" or not any(instead)):
        raise invalid(f"{where}.content: missing", f"{where}.content", "missing_field")
    if message.tool_calls and message.role != "assistant":
        raise invalid(
            f"{where}.tool_calls: only allowed in assistant messages", f"{where}.tool_calls"
        )


def stop_list(stop: str | list[str] | None) -> list[str]:
    """Return the stop strings. Raises RequestError 400."""
    if stop is None:
        return []
    if isinstance(stop, str):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise invalid(f"stop: 1 to {MAX_STOP_CHARS} characters, got {len(stop)}", "stop")
        return [stop]
    if len(stop) > MAX_STOPS:
        raise invalid(f"stop: at most {MAX_STOPS} strings, got {len(stop)}", "stop")
    return stop


def bias_map(bias: dict[str, float] | None, vocab_size: int) -> dict[int, float]:
    """Return the bias by token id. Raises RequestError 400."""
    if not bias:
        return {}
    if len(bias) > MAX_BIAS:
        raise invalid(f"logit_bias: at most {MAX_BIAS} tokens, got {len(bias)}", "logit_bias")
    out = {}
    for key, value in bias.items():
        # isdecimal() also accepts other scripts' digits, which int() reads just as well.
        token = int(key) if key.isdecimal() and len(key) <= 10 else -1
        if not 0 <= token < vocab_size:
            raise invalid(
                f"logit_bias: '{key[:40]}' is not a token id from 0 to {vocab_size - 1}",
                "logit_bias",
            )
        out[token] = value
    return out


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Refuse token ids outside the vocabulary."""
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    for pos, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise invalid(
                f"{param}[{pos}]: token id {token} is not from 0 to {vocab_size - 1}",
                f"{param}[{pos}]",
            )


def split_prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """Return the prompts of a completion body, each text or token ids. Raises RequestError 400."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise invalid(
            "prompt: a list must hold only strings, only token ids or only lists", "prompt"
        )
    return [prompt] if kinds == {int} else prompt
