"""What one client saw of one stream, and the figures of many. Pure: no I/O, no clock."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench import sse, stats
from bench.errors import BenchError


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
