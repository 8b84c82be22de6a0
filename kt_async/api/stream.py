"""The streamed answer of one request: frames out, signs of life, errors as events. [loop]"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import orjson
from aiohttp import web

from kt_async.api.bodies import Body, ChatBody
from kt_async.api.choice import Choice, LoggedToken
from kt_async.api.errors import error_body
from kt_async.api.logprobs import chat_logprobs, text_logprobs
from kt_async.api.run import Run
from kt_async.api.sse import DONE, HEARTBEAT, EventWriter, Frames, error_frame
from kt_async.api.state import ApiState, TokenizerLike

logger = logging.getLogger(__name__)

LogprobsOf = Callable[[list[LoggedToken], TokenizerLike], dict[str, Any]]


class Stream:
    """Answers one request as events: one write for each step, whatever it brought."""

    def __init__(
        self, request: web.Request, state: ApiState, body: Body, run: Run, frames: Frames
    ) -> None:
        options = body.stream_options
        self._state = state
        self._run = run
        self._frames = frames
        self._writer = EventWriter(request)
        self._speed = bool(body.return_speed)
        self._usage = bool(options and options.include_usage)
        self._continuous = self._usage and bool(options and options.continuous_usage_stats)
        chat = isinstance(body, ChatBody)
        logprobs = getattr(body, "logprobs", None)
        wanted = bool(logprobs) if chat else logprobs is not None
        self._logprobs_of: LogprobsOf | None = None
        if wanted:
            self._logprobs_of = chat_logprobs if chat else text_logprobs
        # With return_speed a later null would erase the usage that clients keep, so none is sent.
        self._no_usage = b',"usage":null' if self._usage and not self._speed else b""
        self._beat_due = False
        self._timer: asyncio.TimerHandle | None = None

    async def serve(self) -> web.StreamResponse:
        """Send everything. Raises RequestError when it fails before the first frame."""
        run, writer = self._run, self._writer
        self._arm(self._state.settings.first_frame_s)
        try:
            while True:
                await run.wait()
                # Finished is read first: what the last step brought is taken below.
                finished = run.finished
                error = run.error
                if error is not None:
                    if not writer.started:
                        raise error
                    run.cancel()
                    await writer.write(self._collect() + error_frame(error_body(error)))
                    return writer.response
                data = self._collect()
                if finished:
                    data += self._end()
                elif not data and self._beat_due:
                    data = self._idle_frames()
                self._beat_due = False
                if data:
                    await writer.write(data)
                if finished:
                    return writer.response
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _arm(self, delay_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(
            delay_s, self._tick, self._writer.writes
        )

    def _tick(self, writes_before: int) -> None:
        """Timer: ask for a sign of life when nothing was sent, and look at the backlog."""
        settings = self._state.settings
        if self._run.unsent_bytes() > settings.max_stream_backlog:
            logger.warning("%s cancelled: the client does not read", self._run.request_id)
            self._run.cancel()
        if self._writer.writes == writes_before:
            self._beat_due = True
            self._run.wake()
        self._arm(settings.heartbeat_s)

    def _idle_frames(self) -> bytes:
        if self._writer.started:
            return HEARTBEAT
        frames = b"".join(self._open(choice) for choice in self._run.choices)
        return frames or HEARTBEAT

    def _open(self, choice: Choice) -> bytes:
        choice.opened = True
        return self._frames.start(choice.index, self._no_usage)

    def _collect(self) -> bytes:
        """Return the frames of all that is ready, one per choice and kind."""
        run, frames = self._run, self._frames
        if not run.dirty:
            return b""
        dirty, run.dirty = run.dirty, []
        out = []
        for choice in dirty:
            choice.queued = False
            text, items = choice.take()
            done = choice.finish_reason is not None and choice.error is None
            if not choice.opened and (text or items or done):
                out.append(self._open(choice))
            if text or items:
                logprobs = None
                if self._logprobs_of is not None:
                    logprobs = self._logprobs_of(items, self._state.tokenizer)
                extra = self._usage_now() if self._continuous else self._no_usage
                out.append(frames.content(choice.index, text, logprobs, extra))
            if done and not choice.closed:
                choice.closed = True
                reason = choice.finish_reason or ""
                out.append(frames.finish(choice.index, reason, self._finish_extra()))
        return b"".join(out)

    def _usage_now(self) -> bytes:
        return b',"usage":' + orjson.dumps(self._run.usage(speed=self._speed))

    def _finish_extra(self) -> bytes:
        """Return usage and timings where they belong into a choice's last frame."""
        extra = self._usage_now() if self._speed or self._continuous else self._no_usage
        if self._run.finished:
            extra += b',"timings":' + orjson.dumps(self._run.timings())
        return extra

    def _end(self) -> bytes:
        """Return what follows the last choice."""
        if not self._usage:
            return DONE
        return self._frames.usage(self._usage_now()) + DONE
