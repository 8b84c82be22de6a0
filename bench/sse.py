"""Server-sent events and OpenAI stream frames, as a client reads them. Pure: bytes in, data out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

_OBJECTS = ("text_completion", "chat.completion.chunk", "text_completion.chunk")


class FrameError(ValueError):
    """A frame that an OpenAI client could not read; the sentence says what is wrong with it."""


class SseParser:
    """Incremental parser: feed() what arrives, get the `data` of every finished event.

    Comment lines (": ping") and fields other than `data` are skipped, as clients do.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of each event that this chunk ends; several data lines are joined by \\n."""
        self._buffer += chunk
        lines = self._buffer.split(b"\n")
        self._buffer = lines.pop()
        events = []
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line:
                self._line(line)
            elif self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events

    def _line(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))

    @property
    def has_rest(self) -> bool:
        """Whether an unfinished event is left: true at the end of a cut stream."""
        return bool(self._buffer.strip() or self._data)


@dataclass(frozen=True, slots=True)
class Frame:
    """What one stream frame says.

    text: its new text, reasoning included. has_choice: false in a frame of usage alone. usage: None
    when the frame has none. is_done: the `[DONE]` mark.
    """

    text: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None
    is_done: bool = False
    has_choice: bool = False


def parse_frame(data: bytes) -> Frame:
    """Read one event of /v1/completions or /v1/chat/completions.

    Raises FrameError when it is not one, or when the server reports an error in it.
    """
    if data == b"[DONE]":
        return Frame(is_done=True)
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise FrameError(f"a frame is not JSON ({error}): {_short(data)}") from None
    if not isinstance(body, dict):
        raise FrameError(f"a frame is not a JSON object: {_short(data)}")
    if "error" in body:
        raise FrameError(f"the server reports: {error_text(body)}")
    choices = body.get("choices")
    if body.get("object") not in _OBJECTS or not isinstance(choices, list):
        raise FrameError(f"a frame is not an OpenAI chunk: {_short(data)}")
    text, finish_reason = _first_choice(choices, data)
    usage = body.get("usage")
    if usage is not None and not isinstance(usage, dict):
        raise FrameError(f"usage of a frame is not an object: {_short(data)}")
    return Frame(text, finish_reason, usage, has_choice=bool(choices))


def _first_choice(choices: list[Any], data: bytes) -> tuple[str, str | None]:
    text, finish_reason = "", None
    for choice in choices:
        if not isinstance(choice, dict):
            raise FrameError(f"a choice is not an object: {_short(data)}")
        delta = choice.get("delta") or {}
        parts = (choice.get("text"), delta.get("reasoning_content"), delta.get("content"))
        text += "".join(part for part in parts if isinstance(part, str))
        finish_reason = choice.get("finish_reason") or finish_reason
    return text, finish_reason


def error_text(body: Mapping[str, Any]) -> str:
    """The sentence inside an error body of OpenAI's shape or of a looser one."""
    error = body.get("error", body)
    if isinstance(error, Mapping):
        return str(error.get("message") or error.get("detail") or dict(error))
    return str(error)


def _short(data: bytes) -> str:
    shown = data[:120].decode("utf-8", "replace")
    return shown if len(data) <= 120 else shown + "..."
