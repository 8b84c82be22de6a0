"""The engine as the event loop sees it: submit, stream, cancel.

The only module with both asyncio and the engine thread. submit and cancel go straight to the
native scheduler; each step's events come back through one call_soon_threadsafe.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from kt_async.engine.loop import Delivery, EngineLoop
from kt_async.engine.runner import Runner, StepResult
from kt_async.engine.types import EngineInfo, GenerationRequest, StepOutput, TokenLogprob
from kt_async.errors import NativeError, RequestError
from kt_async.ffi import structs
from kt_async.ffi.scheduler import Scheduler

# A kt_event as numpy's tolist() gives it: seq_id, kind, finish, token, token_pos, sample_row,
# num_cached, admit_ns.
EventRow = tuple[int, int, int, int, int, int, int, int]

_FINISH = {
    structs.KT_FINISH_STOP: "stop",
    structs.KT_FINISH_LENGTH: "length",
    structs.KT_FINISH_CANCELLED: "cancelled",
    structs.KT_FINISH_TIMEOUT: "timeout",
    structs.KT_FINISH_ERROR: "error",
}


class LiveGeneration:
    """One sequence; outputs of steps nobody has read yet are merged into one. [loop]"""

    def __init__(self, service: EngineService, seq_id: int, request: GenerationRequest) -> None:
        self._service = service
        self.seq_id = seq_id
        self.request = request
        self.submit_ns = time.monotonic_ns()
        self._waiter: asyncio.Future[None] | None = None
        self._clear()
        self._is_over = False
        self._finish: str | None = None
        self._stopped_by: int | None = None
        self._error: str | None = None
        self._num_cached = 0
        self._queue_s = 0.0
        self._prompt_started = False

    def _clear(self) -> None:
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob | None] = []

    def __aiter__(self) -> AsyncIterator[StepOutput]:
        return self

    async def __anext__(self) -> StepOutput:
        while not (self._tokens or self._prompt_logprobs or self._finish):
            if self._is_over:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._is_over:
            raise StopAsyncIteration
        output = StepOutput(
            tokens=self._tokens,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
            finish_reason=self._finish,
            stopped_by=self._stopped_by,
            num_cached=self._num_cached,
            queue_s=self._queue_s,
            error=self._error,
        )
        self._clear()
        self._is_over = self._finish is not None
        return output

    def cancel(self) -> None:
        if self._finish is None:
            self._service.cancel(self.seq_id)

    def apply(self, event: EventRow, result: StepResult | None) -> None:
        """Take over one event of a step."""
        _, kind, finish, token, _, sample_row, self._num_cached, admit_ns = event
        if admit_ns:
            self._queue_s = max(0.0, (admit_ns - self.submit_ns) * 1e-9)
        sampling = self.request.sampling
        if kind == structs.KT_EVENT_TOKEN:
            self._tokens.append(token)
            if result is not None and sampling.num_logprobs >= 0:
                self._logprobs.append(_logprob(result, sample_row, token, sampling.num_logprobs))
            if finish == structs.KT_FINISH_STOP:
                self._stopped_by = token
        elif kind == structs.KT_EVENT_PROMPT_LOGPROB and result is not None:
            if not self._prompt_started:
                self._prompt_logprobs.append(None)
                self._prompt_started = True
            count = sampling.prompt_logprobs
            self._prompt_logprobs.append(_logprob(result, sample_row, token, count))
        elif kind == structs.KT_EVENT_FINISH:
            self._finish = _FINISH[finish]

    def fail(self, message: str) -> None:
        """End with an error, whatever the scheduler says later."""
        if self._finish is None:
            self._finish = "error"
        if self._finish == "error":
            self._error = message
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _logprob(result: StepResult, row: int, token: int, count: int) -> TokenLogprob:
    top = zip(
        result.top_ids[row, :count].tolist(), result.top_logprobs[row, :count].tolist(), strict=True
    )
    return TokenLogprob(token, float(result.logprobs[row]), tuple(top))


class EngineService:
    """Implements engine.types.Engine over a scheduler and a runner. [loop]"""

    def __init__(self, scheduler: Scheduler, runner: Runner, info: EngineInfo) -> None:
        self.info = info
        self._living: dict[int, LiveGeneration] = {}
        self._ids = itertools.count(1)
        self._failure: str | None = None
        self._failed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._last_stats: Mapping[str, float] = {}
        self._adopt(scheduler, runner)

    def _adopt(self, scheduler: Scheduler, runner: Runner) -> None:
        self._scheduler: Scheduler | None = scheduler
        self._runner: Runner | None = runner
        self._engine: EngineLoop | None = EngineLoop(scheduler, runner, self._from_engine)
        self._started_ns = time.monotonic_ns()

    def start(self) -> None:
        assert self._engine is not None, "started after it was closed"
        self._engine.start()

    async def wait_failure(self) -> str:
        """Return why the engine has ended, once it has."""
        await self._failed.wait()
        return self._failure or "unknown failure"

    def busy_s(self) -> float:
        """How long the engine's step in progress has taken so far; 0 when it waits for work."""
        begin = 0 if self._engine is None else self._engine.busy_since_ns
        return (time.monotonic_ns() - begin) * 1e-9 if begin else 0.0

    def abandon(self, message: str) -> None:
        """Give up an engine whose thread does not come back: fail all requests, free nothing."""
        self._last_stats = self.stats()
        self._scheduler = self._runner = self._engine = None
        self._fail_all(message)

    async def restart(self, load: Callable[[], tuple[Scheduler, Runner]]) -> None:
        """Free the failed engine, load a new one and start it; the loop stays responsive.

        load runs in a thread; what it raises leaves the service failed and without an engine.
        """
        self._last_stats = self.stats()
        # Nothing here may keep the old engine: the GPU has no room for two.
        await asyncio.to_thread(self._detach())
        await asyncio.to_thread(gc.collect)
        scheduler, runner = await asyncio.to_thread(load)
        self._adopt(scheduler, runner)
        self._failure = None
        self._failed.clear()
        self.start()

    @property
    def healthy(self) -> bool:
        return self._failure is None

    @property
    def failure(self) -> str | None:
        return self._failure

    def submit(self, request: GenerationRequest) -> LiveGeneration:
        if self._failure is not None or self._scheduler is None:
            raise RequestError(503, f"the engine has failed: {self._failure}", code="engine_failed")
        generation = LiveGeneration(self, next(self._ids), request)
        # Registered first: the engine may answer before submit returns.
        self._living[generation.seq_id] = generation
        try:
            accepted = self._scheduler.submit(generation.seq_id, request, generation.submit_ns)
        except NativeError as error:
            del self._living[generation.seq_id]
            raise RequestError(400, str(error), code="invalid_request") from error
        if not accepted:
            del self._living[generation.seq_id]
            raise RequestError(
                429,
                f"the queue is full ({self._scheduler.max_queue} requests are waiting); "
                "try again later",
                code="queue_full",
                retry_after=self._retry_after(),
            )
        return generation

    def cancel(self, seq_id: int) -> None:
        if self._scheduler is not None:
            self._scheduler.cancel(seq_id)

    def stats(self) -> Mapping[str, float]:
        if self._scheduler is None or self._runner is None or self._engine is None:
            return self._last_stats
        values: dict[str, float] = dict(self._scheduler.stats())
        values.update({f"runner_{k}": v for k, v in self._runner.stats().items()})
        values["engine_host_ns"] = self._engine.host_ns
        return values

    def running(self) -> Sequence[int]:
        """Ids of the sequences that have not ended."""
        return list(self._living)

    def close(self) -> None:
        """Stop the engine thread and free the model; blocks for at most one step."""
        self._detach()()

    def _detach(self) -> Callable[[], None]:
        """Forget the engine, so that no call reaches it any more; the result frees it."""
        engine, scheduler, runner = self._engine, self._scheduler, self._runner
        self._scheduler = self._runner = self._engine = None

        def free() -> None:
            # None: a restart has failed, or the engine was abandoned.
            if engine is not None and scheduler is not None and runner is not None:
                engine.stop()
                scheduler.close()
                runner.close()

        return free

    def _retry_after(self) -> int:
        """Seconds after which a place in the queue is likely, from recent throughput."""
        stats = self.stats()
        uptime_s = max(1.0, (time.monotonic_ns() - self._started_ns) * 1e-9)
        finished_per_s = stats["finished"] / uptime_s
        return min(60, max(1, round(1.0 / finished_per_s))) if finished_per_s > 0 else 5

    def _from_engine(self, delivery: Delivery) -> None:
        """[engine] One wake-up of the loop per step."""
        try:
            self._loop.call_soon_threadsafe(self._dispatch, delivery)
        except RuntimeError:  # the loop closed first: nobody is left to tell
            if not self._loop.is_closed():
                raise

    def _dispatch(self, delivery: Delivery) -> None:
        touched: dict[int, LiveGeneration] = {}
        for event in delivery.events.tolist():  # tuples: field access on numpy rows is slow
            seq_id, kind, finish = event[:3]
            generation = self._living.get(seq_id)
            if generation is None:
                continue
            generation.apply(event, delivery.result)
            touched[seq_id] = generation
            if kind == structs.KT_EVENT_FINISH:
                del self._living[seq_id]
                if finish == structs.KT_FINISH_ERROR:
                    generation.fail(delivery.failure or "the step failed")
        for generation in touched.values():
            generation.wake()
        if delivery.is_fatal:
            self._fail_all(delivery.failure or "unknown failure")

    def _fail_all(self, message: str) -> None:
        self._failure = message
        self._failed.set()
        living = list(self._living.values())
        self._living.clear()
        for generation in living:
            generation.fail(message)
