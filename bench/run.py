"""Start a server, check what it answers, then measure it: `make bench`.

Order: outputs (greedy text alone == among eight clients == without streaming), idle CPU, first
byte, prefill, then each number of clients. Prints a table, appends JSON lines to results/ and draws
plots. Needs no network. Exit code 1: wrong outputs; 2: the server or the options do not work.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench`, when run as a script

import aiohttp

from bench import options, plots, process, prompts, record, serve, stats
from bench.serve import BenchError

_CHECK_CLIENTS = 8
_CHECK_TOKENS = 32
_CHECK_WORDS = (3, 9, 17, 30, 48, 75, 110, 160)  # prompt lengths of the check, mixed on purpose
_FIRST_BYTE_RUNS = 20

# What is asked of the demo model on a two-core machine: figure -> (limit, unit).
TARGETS = {
    "ready_s": (6.0, "s from exec to /health ready"),
    "idle_cpu_percent": (0.5, "% of a core, idle server"),
    "first_byte_ms": (30.0, "ms to the first SSE byte, 10-token prompt"),
    "host_us_per_step": (1500.0, "us of host time a decode step"),
}


class WrongOutputError(BenchError):
    """The server's text depends on something it must not depend on."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All options have defaults that suit the demo model."""
    parser = argparse.ArgumentParser(description="Check and measure a kt_async server.")
    parser.add_argument("--gguf_path", help="model to serve (the demo model)")
    parser.add_argument("--model_path", help="its configuration and tokenizer folder")
    parser.add_argument("--server_args", default="", help="more flags for the server, one string")
    parser.add_argument("--url", help="measure a running server instead of starting one")
    parser.add_argument("--clients", type=options.counts, default=[1, 4, 8],
                        help="clients at once, separated by commas (1,4,8)")  # fmt: skip
    parser.add_argument("--runs", type=options.positive, default=5, help="runs of each cell (5)")
    parser.add_argument("--prompt_tokens", type=options.positive, default=64,
                        help="tokens of each client's prompt (64)")  # fmt: skip
    parser.add_argument("--max_tokens", type=options.positive, default=64,
                        help="tokens each client generates (64)")  # fmt: skip
    parser.add_argument("--prefill_tokens", type=options.positive, default=512,
                        help="prompt of the prefill measurement (512)")  # fmt: skip
    parser.add_argument("--idle_s", type=float, default=5.0, help="seconds of the idle test (5)")
    parser.add_argument("--start_timeout", type=float, default=600.0, help="seconds (600)")
    parser.add_argument("--out", type=Path, help="result file (results/serve-TIME.jsonl)")
    parser.add_argument("--no_plots", action="store_true", help="write no PNG files")
    return parser.parse_args(argv)


def server_command(args: argparse.Namespace, port: int) -> list[str]:
    """The command line of the server under test."""
    command = [sys.executable, "-m", "kt_async", "--host", "127.0.0.1", "--port", str(port)]
    for name in ("gguf_path", "model_path"):
        if value := getattr(args, name):
            command += [f"--{name}", value]
    try:
        return command + shlex.split(args.server_args)
    except ValueError as error:
        raise BenchError(f"--server_args cannot be split: {error}") from None


@contextlib.contextmanager
def running_server(args: argparse.Namespace) -> Iterator[process.Server | None]:
    """The started server once it is ready; None with --url."""
    if args.url:
        yield None
        return
    port = process.free_port()
    env = dict(os.environ, PYTHONPATH=str(record.ROOT))
    with process.Server(server_command(args, port), port, env=env) as server:
        print(f"starting: {shlex.join(server.command)}", flush=True)
        server.wait_ready(args.start_timeout)
        yield server


async def check_outputs(session: aiohttp.ClientSession, target: serve.Target) -> int:
    """Compare greedy texts alone, among eight clients and without streaming; returns how many.

    Raises WrongOutputError at the first difference.
    """
    texts = [prompts.words(count, 7_000 + count) for count in _CHECK_WORDS]
    alone = [
        (await serve.run_clients(session, target, [text], _CHECK_TOKENS))[0].text for text in texts
    ]
    for i, text in enumerate(texts):
        body = target.body(text, _CHECK_TOKENS, stream=False)
        answer = await serve.complete(session, target, body)
        same(alone[i], answer["choices"][0]["text"], f"prompt {i} without streaming")
    for count in (_CHECK_CLIENTS, _CHECK_CLIENTS // 2):
        streams = await serve.run_clients(session, target, texts[:count], _CHECK_TOKENS)
        for i, stream in enumerate(streams):
            same(alone[i], stream.text, f"prompt {i} among {count} clients")
    return 2 * len(texts) + _CHECK_CLIENTS // 2


def same(expected: str, found: str, where: str) -> None:
    """Raise WrongOutputError naming the place of the first difference."""
    if expected == found:
        return
    pos = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
        min(len(expected), len(found)),
    )
    raise WrongOutputError(
        f"greedy text of {where} differs from the text alone at character {pos}: "
        f"{expected[pos : pos + 20]!r} became {found[pos : pos + 20]!r}"
    )


class Measurement:
    """One benchmark of one server: sends the load, keeps the records, prints as it goes."""

    def __init__(
        self,
        args: argparse.Namespace,
        session: aiohttp.ClientSession,
        target: serve.Target,
        vocab: int,
    ) -> None:
        self._args = args
        self._session = session
        self._target = target
        self._vocab = vocab
        self._seed = 0

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
        args, runs, raw = self._args, [], []
        before: dict[str, float] = {}
        for index in range(args.runs + 1):
            if index == 1:
                before = await self.counters()
            load = [self.prompt(args.prompt_tokens) for _ in range(count)]
            streams = await serve.run_clients(self._session, self._target, load, args.max_tokens)
            if index:
                runs.append(serve.summarize(streams))
                raw.append([serve.raw_sample(stream) for stream in streams])
        samples: dict[str, list[float | None]] = {
            name: [run[name] for run in runs] for name in runs[0]
        }
        host = host_us_per_step(before, await self.counters())
        if host is not None:
            samples["host_us_per_step"] = [host]
        shape = {
            "clients": count,
            "prompt_tokens": args.prompt_tokens,
            "max_tokens": args.max_tokens,
        }
        return shape | cell(samples) | {"raw": raw}

    async def counters(self) -> dict[str, float]:
        """The server's metrics without labels; empty when it has none."""
        url = self._target.base_url + "/metrics"
        async with self._session.get(url, headers=self._target.headers) as reply:
            return parse_metrics(await reply.text()) if reply.status == 200 else {}


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


def cells_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Medians of each number of clients, with the spread of the total."""
    columns = (
        ("decode t/s", "decode_tokens_per_s"),
        ("total t/s", "total_tokens_per_s"),
        ("per client t/s", "client_tokens_per_s"),
        ("TTFT p50 ms", "ttft_p50_ms"),
        ("ITL p50 ms", "itl_p50_ms"),
        ("p95 ms", "itl_p95_ms"),
        ("p99 ms", "itl_p99_ms"),
        ("host us/step", "host_us_per_step"),
    )
    rows = []
    for entry in cells:
        middle = entry["median"]
        around = entry["spread"].get("total_tokens_per_s", 0.0)
        rows.append(
            [str(entry["clients"])]
            + [stats.number(middle.get(name)) for _, name in columns]
            + [f"{100 * around:.0f} %"]
        )
    return stats.table(["clients", *(title for title, _ in columns), "spread"], rows)


def target_lines(figures: Mapping[str, float]) -> list[str]:
    """One line for each figure with a target: value, unit, limit and verdict."""
    lines = []
    for name, (limit, unit) in TARGETS.items():
        if name in figures:
            verdict = "ok" if figures[name] <= limit else "ABOVE"
            lines.append(f"{stats.number(figures[name]):>8} {unit} (asked: <= {limit:g}) {verdict}")
    return lines


async def measure(
    args: argparse.Namespace, server: process.Server | None, out: record.ResultFile
) -> list[dict[str, Any]]:
    """Everything after the server is ready; returns the cells of the client counts."""
    base_url = args.url or (server.base_url if server else "")
    async with serve.new_session() as session:
        name, vocab = await serve.find_model(session, base_url)
        extra = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        count = await check_outputs(session, serve.Target(base_url, name))
        print(f"model {name}: {count} greedy outputs agree", flush=True)
        common = {"model": name, "server_command": server.command if server else args.url}
        target = serve.Target(base_url, name, stream_extra=extra)
        bench = Measurement(args, session, target, vocab)
        figures: dict[str, float] = {}

        def keep(kind: str, entry: dict[str, Any]) -> None:
            out.append(kind, common | entry)
            figures.update({k: v for k, v in entry["median"].items() if v is not None})

        if server:
            idle = await asyncio.to_thread(server.idle_cpu_percent, args.idle_s)
            keep("start", cell({"ready_s": [server.ready_s], "idle_cpu_percent": [idle]}))
        keep("first_byte", await bench.first_byte())
        keep("prefill", await bench.prefill())
        prefill = stats.number(figures["prefill_tokens_per_s"])
        print(f"prefill of {args.prefill_tokens} tokens: {prefill} tokens/s", flush=True)
        cells = []
        for count in args.clients:
            entry = await bench.clients(count)
            out.append("serve", common | entry)
            cells.append(entry)
            if count == min(args.clients) and entry["median"].get("host_us_per_step") is not None:
                figures["host_us_per_step"] = entry["median"]["host_us_per_step"]
        if server and (peak := process.peak_rss_bytes(server.pid)):
            keep("memory", cell({"peak_rss_bytes": [float(peak)]}))
            print(f"peak resident memory: {peak / 1e6:,.0f} MB")
    print("\n".join(target_lines(figures)))
    return cells


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 for wrong outputs, 2 after one sentence about what does not work."""
    args = parse_args(argv)
    out = record.ResultFile(args.out or record.ResultFile.default_path("serve"))
    try:
        with running_server(args) as server:
            cells = asyncio.run(measure(args, server, out))
        print("\n" + cells_table(cells))
        print(f"\nresults: {out.path}")
        if not args.no_plots:
            draw(cells, out.path, args)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1 if isinstance(error, WrongOutputError) else 2
    except KeyboardInterrupt:
        return 130
    return 0


def draw(cells: Sequence[Mapping[str, Any]], path: Path, args: argparse.Namespace) -> None:
    """Plots beside the result file, or one line that says why there are none."""
    title = f"prompt {args.prompt_tokens}, output {args.max_tokens} tokens, {args.runs} runs"
    try:
        for written in plots.draw(cells, path.with_suffix(""), title):
            print(f"plot: {written}")
    except BenchError as error:
        print(f"note: {error}")


if __name__ == "__main__":
    sys.exit(main())
