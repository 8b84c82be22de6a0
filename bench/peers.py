r"""Our server against another OpenAI-compatible one, on the same model file, by the same client.

The servers run one after the other, several rounds in turn (A B A B ...), never at the same time:
they would share the memory bandwidth that decides their speed. Command templates name {port},
{model} and, where the server wants to know it, {clients} (the largest number), for example
  python bench/peers.py --model m.gguf \
    --peer "llama-server --port {port} -m {model} -np {clients} -c 65536"
Prints tokens/s of every cell, the ratio ours / peer and, when the machine's read bandwidth is
given, the share of the memory bound that each reaches (bound.py). Exit code 2 when a server does
not work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench`, when run as a script

import aiohttp

from bench import bound, options, process, prompts, record, serve, stats, trace
from bench.errors import BenchError

_OURS = f"{sys.executable} -m kt_async --host 127.0.0.1 --port {{port}} --gguf_path {{model}}"
_OURS += " --max_batch_size {clients}"
_WARM_UP = (32, 8)  # prompt and output tokens of the first request


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Options; lengths and client counts are those of the cells."""
    parser = argparse.ArgumentParser(description="Compare our server with another one.")
    parser.add_argument("--model", required=True, help="model file for {model} of both commands")
    parser.add_argument("--peer", required=True, help="command template of the other server")
    parser.add_argument("--ours", default=_OURS, help="our command template (%(default)s)")
    parser.add_argument("--clients", type=options.counts, default=[1, 4, 8, 16],
                        help="clients at once, separated by commas (1,4,8,16)")  # fmt: skip
    parser.add_argument("--rounds", type=options.positive, default=3,
                        help="how often each server is started and measured (3)")  # fmt: skip
    parser.add_argument("--runs", type=options.positive, default=1, help="runs per round (1)")
    parser.add_argument(
        "--prompt_tokens", type=options.positive, default=64, help="decode cells (64)"
    )
    parser.add_argument("--max_tokens", type=options.positive, default=64, help="decode cells (64)")
    parser.add_argument("--prefill_tokens", type=options.positive, default=512,
                        help="prompt of the prefill cell (512)")  # fmt: skip
    parser.add_argument("--api", choices=("completions", "chat"), default="completions",
                        help="completions sends token ids, chat sends text (%(default)s)")  # fmt: skip
    parser.add_argument("--extra", default="{}", help="JSON object added to every request's body")
    parser.add_argument("--step_mb", type=step_bytes, default={}, metavar="1=460,4=813",
                        help="MB a decode step reads, by clients (from the file)")  # fmt: skip
    parser.add_argument(
        "--bandwidth", type=float, help="read bandwidth in GB/s: also show the bound"
    )
    parser.add_argument("--start_timeout", type=float, default=900.0, help="seconds (900)")
    parser.add_argument("--out", type=Path, help="result file (results/peers-TIME.jsonl)")
    args = parser.parse_args(argv)
    if args.step_mb and not args.bandwidth:
        parser.error("--step_mb needs --bandwidth")
    return args


def step_bytes(text: str) -> dict[int, float]:
    """ "1=460,4=813" -> {1: 460e6, 4: 813e6}: clients -> bytes read by one decode step."""
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            found[options.positive(name)] = float(value) * 1e6
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not CLIENTS=MB") from None
    return found


def bounds_of(args: argparse.Namespace) -> dict[str, float]:
    """Cell -> tokens/s that reading the weights allows; empty without --bandwidth."""
    if not args.bandwidth:
        return {}
    sizes = args.step_mb or bound.step_bytes_of_file(Path(args.model), args.clients)
    return {
        f"decode {n}": bound.tokens_per_s(n, sizes[n], args.bandwidth)
        for n in args.clients
        if n in sizes
    }


@dataclass(frozen=True, slots=True)
class Contender:
    """A server that takes part: its name in the table and its command template."""

    name: str
    command: str


Samples = dict[str, dict[str, list[float]]]  # cell -> contender -> tokens/s of each run


class Client:
    """Sends the same load to every contender: the seeds start over with each server."""

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
        self._seed = 0
        self._vocab = vocab
        self._scale = prompts.Scale()

    async def prepare(self) -> None:
        """Warm up; for chat also learn how many tokens the server makes of a word."""
        if self._target.api == "chat":
            found = []
            for count in (16, 80):
                text = prompts.words(count, count)
                (stream,) = await serve.run_clients(self._session, self._target, [text], 1)
                if stream.num_prompt is not None:
                    found.append((count, stream.num_prompt))
            if len(found) == 2:
                self._scale = prompts.Scale.fit(found[0], found[1])
        await self._load(1, *_WARM_UP)

    def _prompt(self, num_tokens: int) -> serve.Prompt:
        self._seed += 1
        if self._target.api == "chat":
            return prompts.text_of_tokens(num_tokens, self._seed, self._scale)
        return prompts.token_ids(num_tokens, self._seed, self._vocab)

    async def _load(self, clients: int, num_prompt: int, max_tokens: int) -> list[trace.Stream]:
        load = [self._prompt(num_prompt) for _ in range(clients)]
        return await serve.run_clients(self._session, self._target, load, max_tokens)

    async def decode(self, clients: int) -> float:
        """Tokens per second of all clients while all decode."""
        streams = await self._load(clients, self._args.prompt_tokens, self._args.max_tokens)
        speed = trace.steady_tokens_per_s(streams)
        if speed is None:
            raise BenchError(
                f"{clients} clients never decoded at the same time: the server runs fewer at once, "
                f"or --max_tokens {self._args.max_tokens} is too short"
            )
        return speed

    async def prefill(self) -> float:
        """Prompt tokens per second of one client."""
        (stream,) = await self._load(1, self._args.prefill_tokens, 1)
        return (stream.num_prompt or self._args.prefill_tokens) / stream.ttft


async def measure(
    args: argparse.Namespace, server: process.Server, name: str, into: Samples
) -> None:
    """All cells of one round of one contender."""
    async with serve.new_session() as session:
        model, vocab = await serve.find_model(session, server.base_url)
        target = serve.Target(server.base_url, model, args.api, json.loads(args.extra))
        client = Client(args, session, target, vocab)
        await client.prepare()
        for _ in range(args.runs):
            for count in args.clients:
                add(into, f"decode {count}", name, await client.decode(count))
            add(into, f"prefill {args.prefill_tokens}", name, await client.prefill())


def add(samples: Samples, cell: str, name: str, value: float) -> None:
    """Append one sample."""
    samples.setdefault(cell, {}).setdefault(name, []).append(value)


def ratio_rows(
    samples: Samples, ours: str, peer: str, bounds: Mapping[str, float]
) -> list[list[str]]:
    """Table rows: cell, both medians with spread, ratio, bound and both shares of it."""
    rows = []
    for cell, by_name in samples.items():
        mine, other = stats.median(by_name[ours]), stats.median(by_name[peer])
        row = [cell]
        for name, value in ((ours, mine), (peer, other)):
            row += [stats.number(value), f"{100 * stats.spread(by_name[name]):.0f} %"]
        row.append(f"{mine / other:.2f}")
        if bounds:
            limit = bounds.get(cell)
            row.append(stats.number(limit))
            row += ["-" if not limit else f"{100 * v / limit:.0f} %" for v in (mine, other)]
        rows.append(row)
    return rows


def header(ours: str, peer: str, has_bounds: bool) -> list[str]:
    """Column titles that fit ratio_rows."""
    titles = ["tokens/s", ours, "+-", peer, "+-", "ratio"]
    return titles + (["bound", f"{ours} of it", f"{peer} of it"] if has_bounds else [])


def run_round(args: argparse.Namespace, contender: Contender, samples: Samples) -> None:
    """Start a contender, measure it, stop it."""
    port = process.free_port()
    command = process.fill(
        contender.command, {"port": port, "model": args.model, "clients": max(args.clients)}
    )
    env = dict(os.environ, PYTHONPATH=str(record.ROOT))
    with process.Server(command, port, env=env) as server:
        ready = server.wait_ready(args.start_timeout)
        print(f"{contender.name}: ready after {ready:.1f} s", flush=True)
        asyncio.run(measure(args, server, contender.name, samples))


def check_extra(text: str) -> None:
    """Raise BenchError unless --extra is a JSON object."""
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise BenchError(f"--extra is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BenchError(f"--extra is not a JSON object: {text}")


def compare(args: argparse.Namespace, contenders: Sequence[Contender]) -> Samples:
    """All rounds in turn."""
    samples: Samples = {}
    for index in range(args.rounds):
        print(f"round {index + 1} of {args.rounds}", flush=True)
        for contender in contenders:
            run_round(args, contender, samples)
    return samples


def write(args: argparse.Namespace, contenders: Sequence[Contender], samples: Samples) -> Path:
    """One record per cell and contender, in the form report.py reads."""
    out = record.ResultFile(args.out or record.ResultFile.default_path("peers"))
    for cell, by_name in samples.items():
        kind, number = cell.split()
        is_decode = kind == "decode"
        for contender in contenders:
            runs = by_name[contender.name]
            out.append(
                "peers",
                {
                    "server": contender.name,
                    "server_command": contender.command,
                    "clients": int(number) if is_decode else 1,
                    "prompt_tokens": args.prompt_tokens if is_decode else int(number),
                    "max_tokens": args.max_tokens if is_decode else 1,
                    "runs": {f"{kind}_tokens_per_s": runs},
                    "median": {f"{kind}_tokens_per_s": stats.median(runs)},
                },
            )
    return out.path


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 after one sentence about the server that does not work."""
    args = parse_args(argv)
    contenders = (Contender("ours", args.ours), Contender("peer", args.peer))
    try:
        if note := record.busy_note():
            print(note)
        check_extra(args.extra)
        bounds = bounds_of(args)
        samples = compare(args, contenders)
        print("\n" + stats.table(header("ours", "peer", bool(bounds)),
                                 ratio_rows(samples, "ours", "peer", bounds)))  # fmt: skip
        print(f"\nresults: {write(args, contenders, samples)}")
    except BenchError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    process.terminate_as_interrupt()
    sys.exit(main())
