"""Prefill and decode speed of a chat server, request by request, with the flags and output lines of
KTransformers' script of the same name.

The times are the server's own (`return_speed`: usage.prefill_time and usage.decode_time); a server
that does not send them is timed from here. Prompts are generated and differ between the requests,
because equal ones would be answered from the prefix cache; --same_prompt makes them equal.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench`, when run as a script

import aiohttp

from bench import options, prompts, serve, trace
from bench.errors import BenchError

_PROBE_WORDS = (16, 80)
_SUFFIX = "/chat/completions"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The published flags, and a few of our own."""
    parser = argparse.ArgumentParser(description="Measure prefill and decode speed of a server.")
    parser.add_argument(
        "--concurrent", type=options.positive, default=1, help="requests at once (1)"
    )
    parser.add_argument("--prompt_lens", type=options.positive, default=1024,
                        help="tokens of a prompt: 1024, 2048, 4096 or any other number (1024)")  # fmt: skip
    parser.add_argument("--api_url", default="http://localhost:10002/v1/chat/completions",
                        help="the chat route (%(default)s)")  # fmt: skip
    parser.add_argument("--model", help="model name (the first one the server lists)")
    parser.add_argument(
        "--max_tokens", type=options.positive, default=50, help="tokens to generate (50)"
    )
    parser.add_argument(
        "--same_prompt", action="store_true", help="send every request the same text"
    )
    parser.add_argument("--ignore_eos", action="store_true", help="always run to max_tokens")
    parser.add_argument("--seed", type=int, default=1, help="seed of the prompts (1)")
    parser.add_argument("--api_key", help="sent as a bearer token")
    return parser.parse_args(argv)


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of one request, and whether the server's own times gave them."""

    prefill: float
    decode: float
    num_tokens: int
    is_from_server: bool


class LinePrinter:
    """Prints `[Request i] <line>` for each whole line of a growing text."""

    def __init__(self, request_id: int) -> None:
        self._request_id = request_id
        self._shown = 0  # characters of the text already printed
        self._text = ""

    def update(self, text: str) -> None:
        """Take the whole text so far."""
        self._text = text
        self._print(is_end=False)

    def finish(self) -> None:
        """Print the last line even though no line break follows."""
        self._print(is_end=True)

    def _print(self, is_end: bool) -> None:
        lines, self._shown = lines_ready(self._text, self._shown, is_end)
        for line in lines:
            print(f"[Request {self._request_id}] {line}", flush=True)


def lines_ready(text: str, shown: int, is_end: bool) -> tuple[list[str], int]:
    """The whole lines of text[shown:] and the new position; at the end also the unfinished one."""
    *lines, rest = text[shown:].split("\n")
    if is_end and rest:
        lines.append(rest)
    return lines, len(text) if is_end else len(text) - len(rest)


def speed_of(stream: trace.Stream) -> Speed:
    """Speeds from usage.prefill_time and decode_time (seconds), else from arrival times.

    Raises BenchError when the stream holds nothing to measure.
    """
    usage: dict[str, Any] = stream.usage or {}
    prefill_s, decode_s = usage.get("prefill_time"), usage.get("decode_time")
    if prefill_s and decode_s and stream.num_prompt is not None:
        return Speed(
            stream.num_prompt / prefill_s, stream.num_tokens / decode_s, stream.num_tokens, True
        )
    if not stream.times or stream.num_prompt is None:
        raise BenchError("the server sent no text or no usage: no speed can be computed")
    return Speed(
        stream.num_prompt / stream.ttft, stream.tokens_per_s or 0.0, stream.num_tokens, False
    )


def target_of(api_url: str, model: str, api_key: str | None) -> serve.Target:
    """Split the chat route's URL. Raises BenchError when it is not one."""
    url = urlsplit(api_url)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise BenchError(f"--api_url {api_url} is not a http URL")
    if not url.path.endswith(_SUFFIX):
        raise BenchError(f"--api_url {api_url} does not end in {_SUFFIX}")
    return serve.Target(
        f"{url.scheme}://{url.netloc}", model, "chat", api_key=api_key, path=url.path
    )


async def first_model(session: aiohttp.ClientSession, target: serve.Target) -> str:
    """The first model that the server lists. Raises BenchError when it lists none."""
    answer = await serve.get_json(session, target, target.path.removesuffix(_SUFFIX) + "/models")
    try:
        return str(answer["data"][0]["id"])
    except (TypeError, KeyError, IndexError):
        raise BenchError("the server lists no models; name one with --model") from None


def body_of(target: serve.Target, prompt: str, max_tokens: int) -> dict[str, Any]:
    """The request KTransformers' script sends, with usage asked for in the standard way too."""
    return {
        "messages": [{"role": "user", "content": prompt}],
        "model": target.model,
        "temperature": 0.3,
        "top_p": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_speed": True,
        "max_tokens": max_tokens,
    } | dict(target.extra)


async def measure_scale(
    session: aiohttp.ClientSession, target: serve.Target, seed: int
) -> prompts.Scale:
    """Ask the server how many tokens it makes of two short texts; also its warm-up."""
    found = []
    for num_words in _PROBE_WORDS:
        body = body_of(target, prompts.words(num_words, seed), 1)
        stream = await serve.read_stream(session, target, body)
        if stream.num_prompt is None:
            return prompts.Scale()
        found.append((num_words, stream.num_prompt))
    try:
        return prompts.Scale.fit(found[0], found[1])
    except ValueError:
        return prompts.Scale()


async def request(
    session: aiohttp.ClientSession, target: serve.Target, body: dict[str, Any], request_id: int
) -> Speed:
    """One request: its text as it comes, then its two speeds."""
    printer = LinePrinter(request_id)
    stream = await serve.read_stream(session, target, body, printer.update)
    printer.finish()
    speed = speed_of(stream)
    print(f"[Request {request_id}] prefill speed: {speed.prefill}")
    print(f"[Request {request_id}] decode speed: {speed.decode}", flush=True)
    return speed


async def run(args: argparse.Namespace) -> None:
    """All requests at once, then the totals (plain sums, as KTransformers prints them).

    Sums overstate requests that did not overlap; the wall clock line does not.
    """
    async with serve.new_session() as session:
        target = target_of(args.api_url, args.model or "", args.api_key)
        if not target.model:
            target = target_of(args.api_url, await first_model(session, target), args.api_key)
        scale = await measure_scale(session, target, -args.seed)
        bodies = []
        for i in range(args.concurrent):
            seed = args.seed * 10_000 + (0 if args.same_prompt else i)
            prompt = prompts.text_of_tokens(args.prompt_lens, seed, scale)
            body = body_of(target, prompt, args.max_tokens)
            bodies.append(body | ({"ignore_eos": True} if args.ignore_eos else {}))
        begin = time.perf_counter()
        speeds = await serve.together(
            [request(session, target, body, i) for i, body in enumerate(bodies)]
        )
    wall_s = time.perf_counter() - begin
    print(f"concurrency: {len(speeds)}")
    print(f"total prefill speed: {sum(speed.prefill for speed in speeds)}")
    print(f" total decode speed: {sum(speed.decode for speed in speeds)}")
    tokens = sum(speed.num_tokens for speed in speeds)
    print(f"wall clock: {tokens} tokens in {wall_s:.2f} s, {tokens / wall_s:.1f} tokens/s overall")
    if not all(speed.is_from_server for speed in speeds):
        print("note: the server sent no prefill_time and decode_time; timed from here")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 after one sentence about what went wrong."""
    try:
        asyncio.run(run(parse_args(argv)))
    except BenchError as error:
        print(f"test_speed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
