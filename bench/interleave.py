"""Time between tokens of decoding clients while one long prompt arrives: a part of bench/gpu.py."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kt_async.engine.loop import Delivery, EngineLoop
from kt_async.engine.runner import Runner
from kt_async.ffi import structs
from kt_async.ffi.scheduler import Scheduler

_SHORT_PROMPT = 64
_QUIET_TOKENS = 40  # of every client before the prompt arrives
_TIMEOUT_S = 120


@dataclass
class Arrivals:
    """When the tokens of each sequence came, and who has ended."""

    tokens: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    ended: set[int] = field(default_factory=set)
    failure: str | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def deliver(self, delivery: Delivery) -> None:
        """[engine]"""
        now = time.monotonic()
        with self.changed:
            for seq_id, kind, *_ in delivery.events.tolist():
                if kind == structs.KT_EVENT_TOKEN:
                    self.tokens[seq_id].append(now)
                elif kind == structs.KT_EVENT_FINISH:
                    self.ended.add(seq_id)
            self.failure = self.failure or delivery.failure
            self.changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds. Raises RuntimeError when the engine fails or is too slow."""
        with self.changed:
            done = self.changed.wait_for(lambda: self.failure or condition(), _TIMEOUT_S)
        if self.failure or not done:
            raise RuntimeError(self.failure or f"no result within {_TIMEOUT_S} s")

    def gaps(self, ids: list[int], begin: float, end: float) -> npt.NDArray[np.float64]:
        """Milliseconds between the tokens of each sequence that came in [begin, end]."""
        found = []
        for seq_id in ids:
            times = np.array(self.tokens[seq_id])
            late = times[1:]
            found.append(1e3 * np.diff(times)[(late >= begin) & (late <= end)])
        return np.concatenate(found)


def measure_interleave(
    scheduler: Scheduler,
    runner: Runner,
    submit: Callable[[int, int], int],
    clients: int,
    length: int,
) -> None:
    """submit(prompt tokens, output tokens) -> sequence id. Prints one line."""
    arrivals = Arrivals()
    loop = EngineLoop(scheduler, runner, arrivals.deliver)
    loop.start()
    try:
        ids = [submit(_SHORT_PROMPT, 4000) for _ in range(clients)]
        arrivals.wait(lambda: all(len(arrivals.tokens[i]) > _QUIET_TOKENS for i in ids))
        begin = time.monotonic()
        long = submit(length, 1)
        arrivals.wait(lambda: long in arrivals.ended)
        end = time.monotonic()
        quiet = arrivals.gaps(ids, arrivals.tokens[ids[-1]][5], begin)
        busy = arrivals.gaps(ids, begin, end)
        for seq_id in ids:
            scheduler.cancel(seq_id)
        arrivals.wait(lambda: arrivals.ended.issuperset(ids))
    finally:
        loop.stop()
    p50, p99 = (np.percentile(busy, q) for q in (50, 99))
    quiet50, quiet99 = (np.percentile(quiet, q) for q in (50, 99))
    print(
        f"{clients:2d} clients, time between tokens p50 {quiet50:.1f} p99 {quiet99:.1f} ms; while "
        f"{length} tokens prefill p50 {p50:.1f} p99 {p99:.1f} max {busy.max():.1f} ms "
        f"(p99 {p99 / quiet50:.2f} x quiet p50, {p99 / p50:.2f} x own), "
        f"{length / (end - begin):.0f} prompt tokens/s",
        flush=True,
    )
