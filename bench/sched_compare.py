"""Simulated comparison of two policies on one bursty chat trace: no model, only times.

"reserve" follows the published scheduler of KTransformers 0.2.4 (balance_serve): pages for
prompt + max_new_tokens are taken when a request is admitted, one request at a time waits for them,
at most two prompts prefill in a step with (chunk_size - (max_batch_size - 2)) / 2 tokens each, twice
that when only one does and few decode; no prefix cache. "on demand" is the native scheduler. Both
run on the same engine model: a step takes base + per_token * tokens + per_row * decodes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib import pyplot

from bench import sched_replay
from kt_async.engine.types import GenerationRequest, SamplingParams
from kt_async.ffi import structs
from kt_async.ffi.scheduler import Scheduler

PAGE_SIZE = 256
BASE_S, PER_TOKEN_S, PER_ROW_S = 0.045, 0.0035, 0.004  # a 30B mixture of experts on a desktop CPU


@dataclass
class Limits:
    """What both policies get: flags of the same name. Defaults: the published command line."""

    max_batch_size: int = 4
    chunk_size: int = 256
    cache_lens: int = 32_768
    max_new_tokens: int = 1024


@dataclass
class Chat:
    """One request of the trace and what happened to it."""

    arrival_s: float
    prompt: npt.NDArray[np.int32]
    output_len: int
    token_s: list[float] = field(default_factory=list)  # when each token came


def make_trace(seed: int = 0, num_users: int = 60, duration_s: float = 600.0) -> list[Chat]:
    """Bursts of users, each with a system prompt in common and a conversation that grows."""
    rng = np.random.default_rng(seed)
    system = rng.integers(0, 50_000, 512, dtype=np.int32)
    chats = []
    for _ in range(num_users):
        begin = float(rng.choice(np.arange(0, duration_s, 120.0)) + rng.exponential(5.0))
        history = system
        for _ in range(int(rng.integers(1, 5))):
            question = rng.integers(0, 50_000, int(rng.lognormal(4.5, 1.0)) + 8, dtype=np.int32)
            output_len = int(min(rng.lognormal(4.6, 0.8) + 16, 1500))
            history = np.concatenate([history, question])[-8192:]
            chats.append(Chat(begin, history, output_len))
            answer = rng.integers(0, 50_000, output_len, dtype=np.int32)
            history = np.concatenate([history, answer])
            begin += output_len * 0.15 + float(rng.exponential(20.0))
    return sorted(chats, key=lambda chat: chat.arrival_s)


def step_s(num_tokens: int, num_decodes: int) -> float:
    """Time of one step on the modelled engine."""
    return BASE_S + PER_TOKEN_S * (num_tokens - num_decodes) + PER_ROW_S * num_decodes


@dataclass
class _Reserved:
    chat: Chat
    pages: int
    num_prefilled: int = 0


def run_reserve(trace: list[Chat], limits: Limits) -> None:
    """The published policy; fills token_s of every chat."""
    free = limits.cache_lens // PAGE_SIZE
    arriving, waiting = deque(trace), deque[Chat]()
    running: list[_Reserved] = []
    now = 0.0
    while arriving or waiting or running:
        while arriving and arriving[0].arrival_s <= now:
            waiting.append(arriving.popleft())
        # One request at a time is prepared, in order: a head that does not fit blocks the rest.
        while waiting and len(running) < limits.max_batch_size:
            head = waiting[0]
            length = min(limits.cache_lens, len(head.prompt) + limits.max_new_tokens)
            pages = -(-length // PAGE_SIZE)
            if pages > free:
                break
            free -= pages
            running.append(_Reserved(waiting.popleft(), pages))
        if not running:
            now = arriving[0].arrival_s
            continue
        decodes = [r for r in running if r.num_prefilled == len(r.chat.prompt)]
        prefills = [r for r in running if r.num_prefilled < len(r.chat.prompt)][:2]
        share = max(1, (limits.chunk_size - (limits.max_batch_size - 2)) // 2)
        if len(prefills) == 1 and len(decodes) <= limits.max_batch_size - 2:
            share *= 2
        chunks = [min(share, len(r.chat.prompt) - r.num_prefilled) for r in prefills]
        now += step_s(sum(chunks) + len(decodes), len(decodes))
        for row, chunk in zip(prefills, chunks, strict=True):
            row.num_prefilled += chunk
        for row in [*decodes, *prefills]:
            if row.num_prefilled == len(row.chat.prompt):
                row.chat.token_s.append(now)
        for row in [r for r in running if len(r.chat.token_s) == r.chat.output_len]:
            free += row.pages
            running.remove(row)


def run_native(
    trace: list[Chat],
    limits: Limits,
    target_itl_s: float = 0.0,
    has_cache: bool = True,
    journal: Path | None = None,
) -> dict[str, int]:
    """The native scheduler; fills token_s of every chat and returns its counters."""
    config = structs.sized(
        structs.SchedConfig,
        flags=(structs.KT_SCHED_PREFIX_CACHE if has_cache else 0)
        | (structs.KT_SCHED_JOURNAL if journal else 0),
        max_batch_size=limits.max_batch_size,
        chunk_size=limits.chunk_size,
        page_size=PAGE_SIZE,
        num_pages=limits.cache_lens // PAGE_SIZE,
        max_len=limits.cache_lens,
        max_queue=100_000,
        max_samples=limits.max_batch_size,
        watermark_pages=-1,
        target_itl_ns=int(target_itl_s * 1e9),
    )
    with Scheduler(config) as scheduler:
        block = np.zeros(scheduler.layout.num_bytes, np.uint8)
        # Not the tokens of the trace's answers: reuse is limited to the prompts.
        tokens = np.full(limits.max_batch_size, 50_001, np.int32)
        sampling = SamplingParams(temperature=0.0)
        now, num_submitted, num_ended = 0.0, 0, 0
        while num_ended < len(trace):
            while num_submitted < len(trace) and trace[num_submitted].arrival_s <= now:
                chat = trace[num_submitted]
                request = GenerationRequest("sim", chat.prompt.tolist(), chat.output_len, sampling)
                num_submitted += 1
                assert scheduler.submit(num_submitted, request, int(chat.arrival_s * 1e9))
            if not scheduler.plan(int(now * 1e9), block.ctypes.data):
                now = trace[num_submitted].arrival_s
                continue
            plan = scheduler.plan_struct
            now += step_s(plan.num_tokens, plan.num_decode_rows)
            scheduler.commit(int(now * 1e9), tokens.ctypes.data, plan.num_samples)
            for event in scheduler.drain():
                if event["kind"] == structs.KT_EVENT_TOKEN:
                    trace[int(event["seq_id"]) - 1].token_s.append(now)
                elif event["kind"] == structs.KT_EVENT_FINISH:
                    num_ended += 1
        if journal:
            text = b"".join(iter(scheduler.journal, b""))
            journal.write_text(sched_replay.write_header(config) + text.decode(), "ascii")
        return scheduler.stats()


def summary(trace: list[Chat]) -> dict[str, float]:
    """Tokens/s over the busy span, time to first token and between tokens (s)."""
    assert all(len(chat.token_s) == chat.output_len for chat in trace)
    ttft = [chat.token_s[0] - chat.arrival_s for chat in trace]
    gaps = np.concatenate([np.diff(chat.token_s) for chat in trace])
    total = sum(chat.output_len for chat in trace)
    span = max(chat.token_s[-1] for chat in trace) - trace[0].arrival_s
    return {
        "tokens/s": total / span,
        "ttft p50": float(np.percentile(ttft, 50)),
        "ttft p99": float(np.percentile(ttft, 99)),
        "itl p50": float(np.percentile(gaps, 50)),
        "itl p99": float(np.percentile(gaps, 99)),
    }


def compare(limits: Limits) -> tuple[dict[str, dict[str, float]], dict[str, list[Chat]]]:
    """Figures and finished traces of the four runs."""
    names = ("reserve", "on demand, no cache", "on demand", "on demand, itl 0.5 s")
    traces = {name: make_trace() for name in names}
    run_reserve(traces["reserve"], limits)
    run_native(traces["on demand, no cache"], limits, has_cache=False)
    run_native(traces["on demand"], limits)
    run_native(traces["on demand, itl 0.5 s"], limits, target_itl_s=0.5)
    return {name: summary(trace) for name, trace in traces.items()}, traces


def plot(traces: dict[str, list[Chat]], path: Path) -> None:
    """Cumulative distributions of both latencies."""
    mpl.use("Agg")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for name, trace in traces.items():
        ttft = np.sort([chat.token_s[0] - chat.arrival_s for chat in trace])
        gaps = np.sort(np.concatenate([np.diff(chat.token_s) for chat in trace]))
        left.plot(ttft, np.linspace(0, 1, len(ttft)), label=name)
        right.plot(gaps, np.linspace(0, 1, len(gaps)), label=name)
    left.set(xlabel="time to first token (s)", ylabel="share of requests", title="Waiting")
    right.set(xlabel="time between tokens (s)", ylabel="share of tokens", title="Reading")
    right.set_xscale("log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def record(path: Path) -> int:
    """Command line part of bench/scheduler.py --record."""
    stats = run_native(make_trace(), Limits(), journal=path)
    print(f"{path}: {stats['submitted']} requests in {stats['steps']} steps")
    return 0


def main(out: Path) -> int:
    """Command line part of bench/scheduler.py --compare."""
    chats = make_trace()
    print(
        f"{len(chats)} requests, prompts {sum(len(c.prompt) for c in chats)} tokens, answers "
        f"{sum(c.output_len for c in chats)} tokens; step = {BASE_S} s + {PER_TOKEN_S} s a prompt "
        f"token + {PER_ROW_S} s a decode"
    )
    out.mkdir(parents=True, exist_ok=True)
    for limits in (Limits(), Limits(max_batch_size=16)):
        figures, traces = compare(limits)
        names = list(next(iter(figures.values())))
        print(f"\n{limits}\n{'':24}" + "".join(f"{name:>12}" for name in names))
        for policy, values in figures.items():
            print(f"{policy:24}" + "".join(f"{values[name]:12.2f}" for name in names))
        path = out / f"scheduler_compare_{limits.max_batch_size}.png"
        plot(traces, path)
        print(f"plot: {path}")
    return 0
