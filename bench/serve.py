"""Streaming load generator: n clients at once against an OpenAI-compatible server.

Used by run.py, peers.py and test_speed.py on one event loop of the bench process. A stream that is
not well-formed or has another number of tokens than asked is an error, never a sample.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import orjson

from bench import sse
from bench.errors import BenchError
from bench.trace import Stream, check

Prompt = str | list[int]
T = TypeVar("T")

_JSON = {"Content-Type": "application/json"}
_FALLBACK_VOCAB = 256
_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go and what every body contains.

    base_url: "http://host:port". api: "completions" or "chat". extra, stream_extra: fields added
    to each body, to each streaming body.
    """

    base_url: str
    model: str
    api: str = "completions"
    extra: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    stream_extra: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""  # the usual path of the api when empty

    @property
    def url(self) -> str:
        return self.base_url.rstrip("/") + (self.path or _PATHS[self.api])

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def body(self, prompt: Prompt, max_tokens: int, stream: bool = True) -> dict[str, Any]:
        """A greedy request that runs to exactly max_tokens. Chat needs a text prompt."""
        body: dict[str, Any] = {"model": self.model, "max_tokens": max_tokens, "temperature": 0}
        if self.api == "chat":
            if not isinstance(prompt, str):
                raise BenchError("the chat API takes text prompts, not token ids")
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        body["ignore_eos"] = True
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            body |= dict(self.stream_extra)
        return body | dict(self.extra)


async def read_stream(
    session: aiohttp.ClientSession,
    target: Target,
    body: Mapping[str, Any],
    on_text: Callable[[str], None] | None = None,
) -> Stream:
    """Post one body and read its stream to the end; on_text gets the whole text after each read.

    Raises BenchError on a refusal, a broken connection or a frame that is no OpenAI chunk.
    """
    parser = sse.SseParser()
    stream = Stream(time.perf_counter())
    try:
        async with session.post(
            target.url, data=orjson.dumps(body), headers=_JSON | target.headers
        ) as reply:
            if reply.status != 200:
                raise BenchError(await _refusal(reply))
            async for chunk in reply.content.iter_any():
                now = time.perf_counter()
                stream.first_byte = stream.first_byte or now
                for data in parser.feed(chunk):
                    stream.take(sse.parse_frame(data), now)
                if on_text is not None:
                    on_text(stream.text)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise BenchError(unreachable(target.url, error)) from None
    except sse.FrameError as error:
        raise BenchError(str(error)) from None
    if parser.has_rest:
        raise BenchError("the stream ends in the middle of a frame")
    stream.end = time.perf_counter()
    return stream


async def _refusal(reply: aiohttp.ClientResponse) -> str:
    raw = await reply.read()
    try:
        text = sse.error_text(orjson.loads(raw))
    except (orjson.JSONDecodeError, AttributeError):
        text = raw[:200].decode("utf-8", "replace")
    return f"{reply.url} answers {reply.status}: {text}"


def unreachable(url: str, error: Exception) -> str:
    """One sentence for a connection that failed or broke."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"no server answers at {url} ({error.os_error.strerror or error.os_error})"
    return f"the connection to {url} failed: {str(error) or type(error).__name__}"


async def complete(session: aiohttp.ClientSession, target: Target, body: Mapping[str, Any]) -> Any:
    """The JSON answer of a request without streaming. Raises BenchError as read_stream."""
    try:
        async with session.post(
            target.url, data=orjson.dumps(body), headers=_JSON | target.headers
        ) as reply:
            if reply.status != 200:
                raise BenchError(await _refusal(reply))
            return orjson.loads(await reply.read())
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise BenchError(unreachable(target.url, error)) from None


async def get_text(session: aiohttp.ClientSession, target: Target, path: str) -> str | None:
    """GET base_url + path, or None when the server has no such route."""
    url = target.base_url.rstrip("/") + path
    try:
        async with session.get(url, headers=target.headers) as reply:
            return await reply.text() if reply.status == 200 else None
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise BenchError(unreachable(url, error)) from None


async def get_json(session: aiohttp.ClientSession, target: Target, path: str) -> Any:
    """GET base_url + path as JSON, or None when there is no such route or it is no JSON."""
    text = await get_text(session, target, path)
    try:
        return None if text is None else orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


async def find_model(session: aiohttp.ClientSession, base_url: str) -> tuple[str, int]:
    """Name and vocabulary size of the model that is served.

    A server that does not tell the size gets 256: every vocabulary is at least that large.
    """
    target = Target(base_url, "")
    answer = await get_json(session, target, "/v1/models")
    try:
        model: dict[str, Any] = dict(answer["data"][0])
        name = str(model["id"])
    except (TypeError, KeyError, IndexError, ValueError):
        raise BenchError(f"{base_url}/v1/models lists no model") from None
    for place in (model, model.get("meta") or {}, model.get("details") or {}):
        for key in ("vocab_size", "n_vocab"):
            if isinstance(place.get(key), int):
                return name, place[key]
    return name, _FALLBACK_VOCAB


def new_session(timeout_s: float = 600.0) -> aiohttp.ClientSession:
    """A session without a connection limit; timeout_s bounds the silence on one socket."""
    return aiohttp.ClientSession(
        # A connection per request: some servers close idle ones just when the next request goes out.
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=timeout_s),
    )


async def together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def run_clients(
    session: aiohttp.ClientSession, target: Target, prompts: Sequence[Prompt], max_tokens: int
) -> list[Stream]:
    """One client per prompt, all started together; every stream is checked."""
    bodies = [target.body(prompt, max_tokens) for prompt in prompts]
    streams = await together([read_stream(session, target, body) for body in bodies])
    for index, stream in enumerate(streams):
        check(stream, max_tokens, index)
    return streams
