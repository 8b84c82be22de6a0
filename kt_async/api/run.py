"""One request's sequences from submit to end. [loop]

A Run pumps every sequence into its Choice, which collects what is ready to be sent; whoever
answers the client takes it when it can. So a client that reads slowly gets fewer, larger pieces
and never holds up the engine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from kt_async.api.choice import Choice
from kt_async.engine.types import Engine, Generation, GenerationRequest
from kt_async.errors import KtError, RequestError
from kt_async.metrics import Metrics

logger = logging.getLogger(__name__)


class Run:
    """All choices of one request, their generations, and its clock."""

    def __init__(
        self, request_id: str, choices: list[Choice], prompt_lens: list[int], metrics: Metrics
    ) -> None:
        """prompt_lens: tokens of each prompt; choices come prompt by prompt, equally many each."""
        self.request_id = request_id
        self.client_id = request_id  # X-Request-Id, when the client sent one
        self.choices = choices
        self.prompt_lens = prompt_lens
        self.metrics = metrics
        self.every_step = False  # wake the waiter at each step, not only at the end
        self.dirty: list[Choice] = []
        self.start_s = time.monotonic()
        self._generations: list[Generation] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._num_running = len(choices)

    @property
    def finished(self) -> bool:
        """Whether no choice runs any more."""
        return self._num_running == 0

    @property
    def error(self) -> RequestError | None:
        """The first error of a choice."""
        return next((c.error for c in self.choices if c.error is not None), None)

    def start(self, engine: Engine, requests: Sequence[GenerationRequest]) -> None:
        """Submit one sequence per choice. Raises RequestError; then none is left running."""
        try:
            for request in requests:
                self._generations.append(engine.submit(request))
        except BaseException:
            self.cancel()
            raise
        self._tasks = [
            asyncio.create_task(self._pump(choice, generation))
            for choice, generation in zip(self.choices, self._generations, strict=True)
        ]

    def cancel(self) -> None:
        """Free everything in the engine at its next step; the choices end with "abort"."""
        for generation in self._generations:
            generation.cancel()

    async def close(self) -> None:
        """Cancel what still runs and wait for the pumps."""
        self.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for choice in self.choices:
            if choice.finish_reason is None:
                self.metrics.count_finish("abort")

    async def wait(self) -> None:
        """Return when there is something to send or, without every_step, when all have ended."""
        if self.finished or (self.every_step and self.dirty):
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        """Let wait() return."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def unsent_bytes(self) -> int:
        """Return about how much was not taken yet."""
        return sum(choice.unsent_bytes() for choice in self.dirty)

    async def _pump(self, choice: Choice, generation: Generation) -> None:
        monotonic = time.monotonic
        try:
            async for out in generation:
                now = monotonic()
                if out.tokens:
                    self._observe(choice, now)
                choice.feed(out, now)
                if choice.finish_reason is not None:
                    break
                if self.every_step:
                    self._mark(choice)
            else:
                choice.fail(
                    RequestError(500, "the engine ended the request early", code="engine_error")
                )
        except RequestError as err:
            choice.fail(err)
        except KtError as err:
            choice.fail(RequestError(500, str(err), code="engine_error"))
        except Exception:  # one request fails, the server goes on
            logger.exception("request %s failed", self.request_id)
            choice.fail(RequestError(500, "internal error", code="internal_error"))
        # Stop strings end a choice while its sequence still runs; for an ended one this is nothing.
        generation.cancel()
        self.metrics.count_finish(choice.finish_reason or "error")
        self._num_running -= 1
        self._mark(choice)

    def _observe(self, choice: Choice, now: float) -> None:
        if choice.first_s is None:
            self.metrics.ttft.observe(now - self.start_s)
        else:
            self.metrics.itl.observe(now - choice.last_s)

    def _mark(self, choice: Choice) -> None:
        if not choice.queued:
            choice.queued = True
            self.dirty.append(choice)
        if self.every_step or self.finished:
            self.wake()

    # ---- accounting ----

    @property
    def num_generated(self) -> int:
        """Tokens generated by all choices, stop tokens included."""
        return sum(choice.num_tokens for choice in self.choices)

    def times(self) -> tuple[float, float, float]:
        """Return (queue, prefill, decode) seconds; prefill and decode are above 0."""
        firsts = [c.first_s for c in self.choices if c.first_s is not None]
        queue = min((c.queue_s for c in self.choices), default=0.0)
        now = time.monotonic()
        first = min(firsts, default=now)
        last = max((c.last_s for c in self.choices), default=0.0)
        return queue, max(first - self.start_s - queue, 1e-6), max(last - first, 1e-6)

    def usage(self, *, speed: bool = False) -> dict[str, Any]:
        """Return the `usage` object. speed: with KTransformers' prefill_time and decode_time."""
        prompt, generated = sum(self.prompt_lens), self.num_generated
        per_prompt = max(1, len(self.choices) // max(1, len(self.prompt_lens)))
        cached = sum(choice.num_cached for choice in self.choices[::per_prompt])
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if speed:
            _, usage["prefill_time"], usage["decode_time"] = self.times()
        return usage

    def timings(self) -> dict[str, Any]:
        """Return llama-server's `timings` object with the time in the queue."""
        queue, prefill, decode = self.times()
        cached = self.usage()["prompt_tokens_details"]["cached_tokens"]
        computed = max(sum(self.prompt_lens) - cached, 0)
        # The first token comes out of the prefill, so decode produced one less per choice.
        decoded = max(self.num_generated - sum(c.first_s is not None for c in self.choices), 0)
        return {
            "queue_ms": round(queue * 1e3, 3),
            "cache_n": cached,
            "prompt_n": computed,
            "prompt_ms": round(prefill * 1e3, 3),
            "prompt_per_token_ms": round(prefill * 1e3 / max(computed, 1), 3),
            "prompt_per_second": round(computed / prefill, 2),
            "predicted_n": self.num_generated,
            "predicted_ms": round(decode * 1e3, 3),
            "predicted_per_token_ms": round(decode * 1e3 / max(decoded, 1), 3),
            "predicted_per_second": round(decoded / decode, 2),
        }
