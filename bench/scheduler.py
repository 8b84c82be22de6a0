"""The scheduler alone: cost of its calls, scaling, a replay of a journal, and a simulated comparison.

    python bench/scheduler.py                 the table of costs (one core, no model)
    python bench/scheduler.py --replay FILE   run a journal again and compare every plan
    python bench/scheduler.py --record FILE   write the journal of a simulated chat trace
    python bench/scheduler.py --compare       against reserve-up-front scheduling, table and plot

Every figure is the median of the given number of calls, through ctypes as the engine makes them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench`, when run as a script

from bench import sched_replay
from kt_async.engine.types import GenerationRequest, SamplingParams
from kt_async.ffi import structs
from kt_async.ffi.scheduler import Scheduler

CONTEXT = 32_768
SAMPLING = SamplingParams(temperature=0.0)


class Bench:
    """A scheduler with a block and constant sampled tokens."""

    def __init__(self, **config: int) -> None:
        values = {
            "flags": structs.KT_SCHED_PREFIX_CACHE,
            "max_batch_size": 16,
            "chunk_size": 1 << 17,
            "page_size": 256,
            "num_pages": 4096,
            "max_len": CONTEXT + 4096,
            "max_queue": 200_000,
            "max_samples": 512,
            "watermark_pages": 0,
            **config,
        }
        self.scheduler = Scheduler(structs.sized(structs.SchedConfig, **values))
        self.block = np.zeros(self.scheduler.layout.num_bytes, np.uint8)
        self.address = self.block.ctypes.data
        self.tokens = np.full(1 << 16, 3, np.int32)
        self.tokens_address = self.tokens.ctypes.data
        self.next_id = 1

    def submit(self, prompt: npt.NDArray[np.int32], max_tokens: int) -> None:
        request = GenerationRequest("bench", cast("Sequence[int]", prompt), max_tokens, SAMPLING)
        assert self.scheduler.submit(self.next_id, request, 0)
        self.next_id += 1

    def step(self) -> bool:
        scheduler = self.scheduler
        if not scheduler.plan(1, self.address):
            return False
        scheduler.commit(2, self.tokens_address, scheduler.plan_struct.num_samples)
        return True

    def run(self) -> None:
        while self.step():
            self.scheduler.drain()
        self.scheduler.drain()


def median_us(body: Callable[[], object], count: int) -> float:
    """Median time of one call."""
    times = []
    for _ in range(count):
        begin = time.perf_counter_ns()
        body()
        times.append(time.perf_counter_ns() - begin)
    return float(np.median(times)) / 1000


def prompt_of(length: int, seed: int) -> npt.NDArray[np.int32]:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, 100_000, length, dtype=np.int32)


def decode_cost(rows: int, page_size: int) -> float:
    """plan + commit of a step of `rows` decodes with 32k-token contexts of their own."""
    pages = rows * (CONTEXT // page_size + 40)
    bench = Bench(max_batch_size=rows, page_size=page_size, num_pages=pages)
    for row in range(rows):
        bench.submit(prompt_of(CONTEXT, row), 4000)
    while bench.scheduler.plan(1, bench.address):
        plan = bench.scheduler.plan_struct
        bench.scheduler.commit(2, bench.tokens_address, plan.num_samples)
        bench.scheduler.drain()
        if plan.num_decode_rows == rows:
            break
    times = []
    for _ in range(300):
        begin = time.perf_counter_ns()
        bench.step()
        times.append(time.perf_counter_ns() - begin)
        bench.scheduler.drain()
    return float(np.median(times)) / 1000


def submit_cost() -> float:
    """Microseconds to submit a 32k prompt that lies in an array."""
    bench = Bench()
    prompt = prompt_of(CONTEXT, 0)
    return median_us(lambda: bench.submit(prompt, 10), 200)


def lookup_cost(num_pages: int, page_size: int) -> tuple[float, float]:
    """Microseconds of the plan that admits a cached 32k prompt, and of a plan + commit of 16
    decodes that evict, while the whole pool holds cached pages."""
    bench = Bench(num_pages=num_pages, page_size=page_size)
    num_stems = num_pages * page_size // CONTEXT
    for seed in range(num_stems + 1):  # one too many, so that the pool is full
        bench.submit(prompt_of(CONTEXT, seed), 1)
    bench.run()
    times = []
    for i in range(15):
        # Another prompt each time while there are enough: its nodes are cold in the CPU's caches.
        bench.submit(prompt_of(CONTEXT, num_stems - i % min(num_stems, 12)), 1)
        begin = time.perf_counter_ns()
        bench.scheduler.plan(1, bench.address)
        times.append(time.perf_counter_ns() - begin)
        assert bench.scheduler.plan_struct.num_tokens == page_size, "the prompt was not cached"
        bench.scheduler.commit(2, bench.tokens_address, bench.scheduler.plan_struct.num_samples)
        bench.run()
    for row in range(16):
        bench.submit(prompt_of(10, 10_000 + row), 4000)
    for _ in range(3):
        bench.step()
    evicted = bench.scheduler.stats()["evicted_pages"]
    step_us = median_us(bench.step, 300)
    assert bench.scheduler.plan_struct.num_decode_rows == 16
    assert bench.scheduler.stats()["evicted_pages"] > evicted
    return float(np.median(times)) / 1000, step_us


def many_requests(count: int) -> tuple[float, int]:
    """CPU seconds for `count` short chats through an engine that takes no time, and its steps."""
    bench = Bench(max_batch_size=256, chunk_size=4096, page_size=16, num_pages=16_384, max_len=1024)
    rng = np.random.default_rng(0)
    prompts = [prompt_of(int(n), i) for i, n in enumerate(rng.integers(8, 128, 1000))]
    lengths = rng.integers(1, 32, count).tolist()
    begin = time.process_time()
    steps = 0
    for i in range(count):
        bench.submit(prompts[i % 1000], lengths[i])
        if i % 64 == 0 and i > 1000:
            bench.step()
            bench.scheduler.drain()
            steps += 1
    while bench.step():
        bench.scheduler.drain()
        steps += 1
    seconds = time.process_time() - begin
    assert bench.scheduler.stats()["finished"] == count
    return seconds, steps


def measure(quick: bool) -> list[tuple[str, float, str, float | None]]:
    """Rows of the table: name, value, unit, limit."""
    rows: list[tuple[str, float, str, float | None]] = [
        ("plan + commit, 16 rows, 32k contexts, page 256", decode_cost(16, 256), "us", 20),
        ("plan + commit, 256 rows, 32k contexts, page 256", decode_cost(256, 256), "us", 100),
        ("plan + commit, 256 rows, 32k contexts, page 64", decode_cost(256, 64), "us", None),
        ("submit of a 32k prompt", submit_cost(), "us", 300),
    ]
    for num_pages in (3_000, 100_000) if quick else (3_000, 30_000, 100_000, 1_000_000):
        lookup, step = lookup_cost(num_pages, 16)
        name = f"{num_pages} cached pages of 16"
        rows.append((f"admit a cached 32k prompt, {name}", lookup, "us", 200))
        rows.append((f"plan + commit, 16 rows, {name}", step, "us", 20))
    count = 10_000 if quick else 100_000
    seconds, _ = many_requests(count)
    rows.append((f"{count} requests through a simulated engine", seconds, "s", count / 20_000))
    return rows


def main() -> int:
    """Exit code 1: a limit is exceeded, or a replay differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="journal to run again")
    parser.add_argument("--record", type=Path, metavar="FILE", help="journal to write")
    parser.add_argument("--compare", action="store_true", help="simulated comparison")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the plot")
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--json", action="store_true", help="one JSON line per figure")
    args = parser.parse_args()
    if args.replay:
        return sched_replay.main(args.replay)
    if args.record or args.compare:
        # Imported here because it needs matplotlib, which only the dev extra brings.
        module = importlib.import_module("bench.sched_compare")
        return int(module.record(args.record) if args.record else module.main(args.out))
    is_met = True
    for name, value, unit, limit in measure(args.quick):
        is_met &= limit is None or value <= limit
        if args.json:
            print(json.dumps({"name": name, "value": value, "unit": unit, "limit": limit}))
        else:
            asked = "" if limit is None else f"  (asked: <= {limit:g})"
            print(f"{name:64} {value:9.1f} {unit}{asked}")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
