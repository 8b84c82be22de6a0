"""Server-sent events: frames as bytes, and the response that carries them.

The framing is pure. Frames are assembled from parts that are constant for a request, so that a
streamed token costs one orjson call for its text and one join.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web

from kt_async.api.state import STREAM

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": waiting\n\n"
_END = b"}\n\n"


def error_frame(error: Mapping[str, Any]) -> bytes:
    """Return an error event; the stream ends after it."""
    return b"event: error\ndata: " + orjson.dumps({"error": error}) + b"\n\n"


class ChatFrames:
    """Frames of a streamed chat completion.

    extra, everywhere: JSON members that follow `choices`, with their leading comma, or nothing.
    """

    def __init__(self, request_id: str, created: int, model: str, num_choices: int) -> None:
        head = _head(request_id, "chat.completion.chunk", created, model)
        self._content = [b'%s{"index":%d,"delta":{' % (head, i) for i in range(num_choices)]
        self._empty = head

    def start(self, index: int, extra: bytes) -> bytes:
        """Return the first frame of a choice."""
        return b"".join(
            (
                self._content[index],
                b'"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]',
                extra,
                _END,
            )
        )

    def content(self, index: int, text: str, logprobs: object, extra: bytes) -> bytes:
        """Return a frame with text. logprobs: object for the `logprobs` member, or None."""
        middle = (
            b'},"logprobs":null,"finish_reason":null}]'
            if logprobs is None
            else b'},"logprobs":' + orjson.dumps(logprobs) + b',"finish_reason":null}]'
        )
        return b"".join(
            (self._content[index], b'"content":', orjson.dumps(text), middle, extra, _END)
        )

    def finish(self, index: int, reason: str, extra: bytes) -> bytes:
        """Return the last frame of a choice."""
        return b'%s},"logprobs":null,"finish_reason":"%s"}]%s}\n\n' % (
            self._content[index],
            reason.encode(),
            extra,
        )

    def usage(self, extra: bytes) -> bytes:
        """Return the frame without choices that carries the usage."""
        return self._empty + b"]" + extra + _END


class TextFrames:
    """Frames of a streamed text completion; members as in ChatFrames."""

    def __init__(self, request_id: str, created: int, model: str, num_choices: int) -> None:
        head = _head(request_id, "text_completion", created, model)
        self._content = [b'%s{"index":%d,"text":' % (head, i) for i in range(num_choices)]
        self._empty = head

    def start(self, index: int, extra: bytes) -> bytes:
        """Return nothing: text completions have no first frame."""
        del index, extra
        return b""

    def content(self, index: int, text: str, logprobs: object, extra: bytes) -> bytes:
        """Return a frame with text."""
        middle = (
            b',"logprobs":null,"finish_reason":null}]'
            if logprobs is None
            else b',"logprobs":' + orjson.dumps(logprobs) + b',"finish_reason":null}]'
        )
        return b"".join((self._content[index], orjson.dumps(text), middle, extra, _END))

    def finish(self, index: int, reason: str, extra: bytes) -> bytes:
        """Return the last frame of a choice."""
        return b'%s"","logprobs":null,"finish_reason":"%s"}]%s}\n\n' % (
            self._content[index],
            reason.encode(),
            extra,
        )

    def usage(self, extra: bytes) -> bytes:
        """Return the frame without choices that carries the usage."""
        return self._empty + b"]" + extra + _END


Frames = ChatFrames | TextFrames


def _head(request_id: str, kind: str, created: int, model: str) -> bytes:
    return b'data: {"id":%s,"object":"%s","created":%d,"model":%s,"choices":[' % (
        orjson.dumps(request_id),
        kind.encode(),
        created,
        orjson.dumps(model),
    )


class EventWriter:
    """The HTTP response of one stream. Headers go out with the first write."""

    __slots__ = ("_request", "response", "started", "writes")

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",  # proxies must not collect frames
            }
        )
        self.started = False
        self.writes = 0

    async def write(self, frames: bytes) -> None:
        """Send frames; waits while the client's window and the socket's buffer are full.

        Raises ConnectionError when the client has gone.
        """
        if not self.started:
            self.started = True
            self._request[STREAM] = self.response  # errors cannot become a status any more
            await self.response.prepare(self._request)
        self.writes += 1
        await self.response.write(frames)
