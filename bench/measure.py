"""The measurements of one running server: first byte, prefill, and each number of clients."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from bench import process, prompts, serve, stats, trace

_FIRST_BYTE_RUNS = 20


class Measurement:
    """One benchmark of one server: sends the load, keeps the records, prints as it goes."""

    def __init__(
        self,
        args: argparse.Namespace,
        session: aiohttp.ClientSession,
        target: serve.Target,
        vocab: int,
        seed: int,
        pid: int | None = None,
    ) -> None:
        """pid: the server's process when it is ours, to see how long it waits for a core."""
        self._args = args
        self._session = session
        self._target = target
        self._vocab = vocab
        self._pid = pid
        self._seed = seed * 1_000_003  # far from the seeds that another run uses

    def prompt(self, num_tokens: int) -> list[int]:
        """A prompt that was never sent before, so that no cache knows it."""
        self._seed += 1
        return prompts.token_ids(num_tokens, self._seed, self._vocab)

    async def first_byte(self) -> dict[str, Any]:
        """Milliseconds from the request to the first SSE byte after a 10-token prompt."""
        streams = [
            (await serve.run_clients(self._session, self._target, [self.prompt(10)], 4))[0]
            for _ in range(_FIRST_BYTE_RUNS + 2)
        ][2:]  # two to warm up
        return cell({"first_byte_ms": [(s.first_byte - s.start) * 1e3 for s in streams]})

    async def prefill(self) -> dict[str, Any]:
        """Prompt tokens per second of one client, from the time to its only token."""
        num_tokens, speeds = self._args.prefill_tokens, []
        for _ in range(self._args.runs + 1):
            prompt = self.prompt(num_tokens)
            (stream,) = await serve.run_clients(self._session, self._target, [prompt], 1)
            speeds.append(num_tokens / stream.ttft)
        found = cell({"prefill_tokens_per_s": speeds[1:]})
        return found | {"clients": 1, "prompt_tokens": num_tokens}

    async def clients(self, count: int) -> dict[str, Any]:
        """All runs of one number of clients, after a warm-up run."""
        args, raw = self._args, []
        runs: list[dict[str, float | None]] = []
        for index in range(args.runs + 1):
            load = [self.prompt(args.prompt_tokens) for _ in range(count)]
            before, cores = await self.counters(), self.core_seconds()
            streams = await serve.run_clients(self._session, self._target, load, args.max_tokens)
            waited = process.wait_percent(cores, self.core_seconds())
            host = host_us_per_step(before, await self.counters())
            if index:
                runs.append(trace.summarize(streams) | {
                    "host_us_per_step": host,
                    "core_wait_percent": waited,
                })  # fmt: skip
                raw.append([trace.raw_sample(stream) for stream in streams])
        samples = {name: [run[name] for run in runs] for name in runs[0]}
        shape = {
            "clients": count,
            "prompt_tokens": args.prompt_tokens,
            "max_tokens": args.max_tokens,
        }
        return shape | cell(samples) | {"raw": raw}

    def core_seconds(self) -> tuple[float, float] | None:
        """Time the server's threads have run and waited for a core."""
        return process.core_seconds(self._pid) if self._pid else None

    async def counters(self) -> dict[str, float]:
        """The server's metrics without labels; empty when it has none."""
        text = await serve.get_text(self._session, self._target, "/metrics")
        return parse_metrics(text or "")


def parse_metrics(text: str) -> dict[str, float]:
    """Name -> value of the samples without labels in Prometheus' text format."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if not line.startswith("#") and value and "{" not in name:
            with contextlib.suppress(ValueError):
                found[name] = float(value.split()[0])
    return found


def host_us_per_step(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """Mean microseconds a step spent outside the model's own run; None without such metrics."""
    nanos, steps = "kt_async:engine_host_ns", "kt_async:engine_steps_total"
    if not all(name in found for name in (nanos, steps) for found in (before, after)):
        return None
    count = after[steps] - before[steps]
    return (after[nanos] - before[nanos]) / count / 1e3 if count > 0 else None


def cell(samples: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """The part of a record that report.py reads: runs, median and spread of each figure."""
    known = {name: [v for v in values if v is not None] for name, values in samples.items()}
    return {
        "runs": {name: values for name, values in known.items() if values},
        "median": {
            name: stats.median(values) if values else None for name, values in known.items()
        },
        "spread": {name: stats.spread(values) for name, values in known.items() if values},
    }
