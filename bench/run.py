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
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench`, when run as a script

from bench import measure, options, outputs, plots, process, record, serve, stats
from bench.errors import BenchError

# What is asked of the demo model on a two-core machine: figure -> (limit, unit).
TARGETS = {
    "ready_s": (6.0, "s from exec to /health ready"),
    "idle_cpu_percent": (0.5, "% of a core, idle server"),
    "first_byte_ms": (30.0, "ms to the first SSE byte, 10-token prompt"),
    "host_us_per_step": (1500.0, "us of host time a decode step"),
}


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
    parser.add_argument("--starts", type=options.positive,
                        help="how often start-up is timed (3; 1 with --gguf_path)")  # fmt: skip
    parser.add_argument("--seed", type=int,
                        help="seed of the prompts (1; the time with --url, whose cache is not empty)")  # fmt: skip
    parser.add_argument("--idle_s", type=float, default=5.0, help="seconds of the idle test (5)")
    parser.add_argument("--start_timeout", type=float, default=600.0, help="seconds (600)")
    parser.add_argument("--out", type=Path, help="result file (results/serve-TIME.jsonl)")
    parser.add_argument("--no_plots", action="store_true", help="write no PNG files")
    return parser.parse_args(argv)


def server_command(args: argparse.Namespace, port: int) -> list[str]:
    """The command line of the server under test: room for all clients, then the user's flags."""
    command = [sys.executable, "-m", "kt_async", "--host", "127.0.0.1", "--port", str(port)]
    for name in ("gguf_path", "model_path"):
        if value := getattr(args, name):
            command += [f"--{name}", value]
    try:
        own = shlex.split(args.server_args)
    except ValueError as error:
        raise BenchError(f"--server_args cannot be split: {error}") from None
    if not any(word.replace("-", "_").startswith("__max_batch_size") for word in own):
        command += ["--max_batch_size", str(max(outputs.CLIENTS, *args.clients))]
    return command + own


@contextlib.contextmanager
def running_server(args: argparse.Namespace) -> Iterator[process.Server | None]:
    """The server once it is ready, with no settings from the environment; None with --url."""
    if args.url:
        yield None
        return
    port = process.free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("KT_ASYNC_")}
    env["PYTHONPATH"] = str(record.ROOT)
    with process.Server(server_command(args, port), port, env=env) as server:
        server.wait_ready(args.start_timeout)
        yield server


def time_starts(args: argparse.Namespace) -> list[float]:
    """Seconds to ready of all starts but the last, which is the one that is measured."""
    if args.url:
        return []
    print(f"starting: {shlex.join(server_command(args, 0))}", flush=True)
    times = []
    for _ in range((args.starts or (1 if args.gguf_path else 3)) - 1):
        with running_server(args) as server:
            times += [server.ready_s] if server else []
    return times


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
        ("core wait %", "core_wait_percent"),
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


async def measure_all(
    args: argparse.Namespace,
    server: process.Server | None,
    starts: list[float],
    out: record.ResultFile,
) -> list[dict[str, Any]]:
    """Everything after the server is ready; returns the cells of the client counts."""
    base_url = args.url or (server.base_url if server else "")
    async with serve.new_session() as session:
        name, vocab = await serve.find_model(session, base_url)
        extra = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        count = await outputs.check_outputs(session, serve.Target(base_url, name))
        print(f"model {name}: {count} greedy outputs agree", flush=True)
        common: dict[str, Any] = {
            "model": name,
            "server_command": server.command if server else args.url,
        }
        target = serve.Target(base_url, name, stream_extra=extra)
        seed = args.seed if args.seed is not None else (time.time_ns() if args.url else 1)
        common["seed"] = seed
        bench = measure.Measurement(
            args, session, target, vocab, seed, server.pid if server else None
        )
        figures: dict[str, float] = {}

        def keep(kind: str, entry: dict[str, Any]) -> None:
            out.append(kind, common | entry)
            figures.update({k: v for k, v in entry["median"].items() if v is not None})

        if server:
            idle = await asyncio.to_thread(server.idle_cpu_percent, args.idle_s)
            keep(
                "start",
                measure.cell({"ready_s": [*starts, server.ready_s], "idle_cpu_percent": [idle]}),
            )
        keep("first_byte", await bench.first_byte())
        keep("prefill", await bench.prefill())
        prefill = stats.number(figures["prefill_tokens_per_s"])
        print(f"prefill of {args.prefill_tokens} tokens: {prefill} tokens/s", flush=True)
        cells = []
        for count in args.clients:
            entry = await bench.clients(count)
            out.append("serve", common | entry)
            cells.append(entry)
            total = stats.number(entry["median"]["total_tokens_per_s"])
            print(f"{count} clients: {total} tokens/s", flush=True)
            if count == min(args.clients) and entry["median"].get("host_us_per_step") is not None:
                figures["host_us_per_step"] = entry["median"]["host_us_per_step"]
        if server and (peak := process.peak_rss_bytes(server.pid)):
            keep("memory", measure.cell({"peak_rss_bytes": [float(peak)]}))
            print(f"peak resident memory: {peak / 1e6:,.0f} MB")
    print("\n".join(target_lines(figures)))
    return cells


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 for wrong outputs, 2 after one sentence about what does not work."""
    args = parse_args(argv)
    out = record.ResultFile(args.out or record.ResultFile.default_path("serve"))
    try:
        if note := record.busy_note():
            print(note)
        starts = time_starts(args)
        with running_server(args) as server:
            cells = asyncio.run(measure_all(args, server, starts, out))
        print("\n" + cells_table(cells))
        print(f"\nresults: {out.path}")
        if not args.no_plots:
            draw(cells, out.path, args)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1 if isinstance(error, outputs.WrongOutputError) else 2
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
    process.terminate_as_interrupt()
    sys.exit(main())
