"""Streaming load generator: n clients at once against an OpenAI-compatible server.

Used by run.py, peers.py and test_speed.py on one event loop of the bench process. A stream that is
not well-formed or has another number of tokens than asked is an error, never a sample.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import orjson

from bench import sse, stats

Prompt = str | list[int]
T = TypeVar("T")

_JSON = {"Content-Type": "application/json"}
_FALLBACK_VOCAB = 256
_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


class BenchError(Exception):
    """The server did not do what the benchmark needs; the sentence is for the terminal."""


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


@dataclass(slots=True)
class Stream:
    """One finished stream. Times are seconds of time.perf_counter().

    times, counts: arrival of each frame that brought tokens, and how many. A frame brings tokens
    when its usage counts more than before (continuous_usage_stats) or, from servers that do not
    send that, when it has text; then its count is 1, except that bytes of a character may be held
    back (num_tokens stays exact).
    """

    start: float
    first_byte: float = 0.0
    end: float = 0.0
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    is_done: bool = False

    def take(self, frame: sse.Frame, now: float) -> None:
        """Add one frame that arrived at `now`."""
        if self.is_done:
            raise sse.FrameError("a frame follows [DONE]")
        count = self._new_tokens(frame)
        if count:
            self.times.append(now)
            self.counts.append(count)
        self.text += frame.text
        self.is_done = frame.is_done
        self.finish_reason = frame.finish_reason or self.finish_reason
        if frame.usage is not None:
            self.usage = dict(frame.usage)

    def _new_tokens(self, frame: sse.Frame) -> int:
        if frame.has_choice and frame.usage is not None:
            known = int((self.usage or {}).get("completion_tokens", 0))
            return int(frame.usage.get("completion_tokens", 0)) - known
        return 1 if frame.text else 0

    @property
    def num_tokens(self) -> int:
        """Generated tokens: the server's usage, else what was counted."""
        return int((self.usage or {}).get("completion_tokens", sum(self.counts)))

    @property
    def num_prompt(self) -> int | None:
        """Prompt tokens by the server's usage."""
        count = (self.usage or {}).get("prompt_tokens")
        return None if count is None else int(count)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.start

    @property
    def gaps(self) -> list[float]:
        """Seconds between the frames that brought tokens."""
        return [b - a for a, b in itertools.pairwise(self.times)]

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed of this client: tokens after the first frame over the time they took."""
        took = self.times[-1] - self.times[0]
        return (self.num_tokens - self.counts[0]) / took if took > 0 else None


def check(stream: Stream, max_tokens: int, index: int) -> None:
    """Raise BenchError unless the stream ended properly with exactly max_tokens tokens."""
    if not stream.is_done:
        raise BenchError(f"stream {index} ended without [DONE]")
    if stream.num_tokens != max_tokens:
        raise BenchError(
            f"stream {index} has {stream.num_tokens} tokens, asked were {max_tokens} with "
            f"ignore_eos (finish_reason {stream.finish_reason})"
        )
    if stream.finish_reason != "length":
        raise BenchError(
            f"stream {index}: finish_reason is {stream.finish_reason}, expected length"
        )
    if not stream.times:
        raise BenchError(f"stream {index} carried no token")


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


async def get_json(session: aiohttp.ClientSession, target: Target, path: str) -> Any:
    """GET base_url + path as JSON, or None when the server has no such route."""
    url = target.base_url.rstrip("/") + path
    try:
        async with session.get(url, headers=target.headers) as reply:
            return orjson.loads(await reply.read()) if reply.status == 200 else None
    except orjson.JSONDecodeError:
        return None
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise BenchError(unreachable(url, error)) from None


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
        connector=aiohttp.TCPConnector(limit=0),
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


def steady_tokens_per_s(streams: Sequence[Stream]) -> float | None:
    """Total decode speed while every client decodes.

    Counts the tokens between the moment the last client got its first one and the moment the first
    client got its last one. None when the clients never all decode together.
    """
    begin = max(stream.times[0] for stream in streams)
    end = min(stream.times[-1] for stream in streams)
    if end <= begin:
        return None
    tokens = 0.0
    for stream in streams:
        inside = sum(
            count
            for moment, count in zip(stream.times, stream.counts, strict=True)
            if begin < moment <= end
        )
        tokens += inside * stream.num_tokens / sum(stream.counts)
    return tokens / (end - begin)


def summarize(streams: Sequence[Stream]) -> dict[str, float | None]:
    """The figures of one run; keys end in their unit. None: not measurable in this run."""
    wall = max(s.end for s in streams) - min(s.start for s in streams)
    gaps = [gap * 1e3 for stream in streams for gap in stream.gaps]
    ttfts = [stream.ttft * 1e3 for stream in streams]
    speeds = [speed for s in streams if (speed := s.tokens_per_s) is not None]
    return {
        "total_tokens_per_s": sum(stream.num_tokens for stream in streams) / wall,
        "decode_tokens_per_s": steady_tokens_per_s(streams),
        "client_tokens_per_s": stats.median(speeds) if speeds else None,
        "ttft_p50_ms": stats.median(ttfts),
        "ttft_max_ms": max(ttfts),
        "itl_p50_ms": stats.percentile(gaps, 50) if gaps else None,
        "itl_p95_ms": stats.percentile(gaps, 95) if gaps else None,
        "itl_p99_ms": stats.percentile(gaps, 99) if gaps else None,
        "wall_s": wall,
    }


def raw_sample(stream: Stream) -> dict[str, Any]:
    """What is kept of a stream in a result file: milliseconds from its start."""
    return {
        "first_byte_ms": round((stream.first_byte - stream.start) * 1e3, 3),
        "frames_ms": [round((moment - stream.start) * 1e3, 3) for moment in stream.times],
        "num_tokens": stream.num_tokens,
        "num_prompt": stream.num_prompt,
    }
