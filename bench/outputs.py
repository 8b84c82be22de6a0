"""Check what a server answers before it is timed: greedy text must not depend on its company."""

from __future__ import annotations

from typing import Any

import aiohttp

from bench import prompts, serve
from bench.errors import BenchError

CLIENTS = 8
_CHECK_TOKENS = 32
_CHECK_WORDS = (3, 9, 17, 30, 48, 75, 110, 160)  # prompt lengths of the check, mixed on purpose


class WrongOutputError(BenchError):
    """The server's text depends on something it must not depend on."""


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
        same(alone[i], text_of(answer), f"prompt {i} without streaming")
    for count in (CLIENTS, CLIENTS // 2):
        streams = await serve.run_clients(session, target, texts[:count], _CHECK_TOKENS)
        for i, stream in enumerate(streams):
            same(alone[i], stream.text, f"prompt {i} among {count} clients")
    return 2 * len(texts) + CLIENTS // 2


def text_of(answer: Any) -> str:
    """The text of an answer without streaming. Raises BenchError when it has another form."""
    try:
        count = answer["usage"]["completion_tokens"]
        text = str(answer["choices"][0]["text"])
    except (TypeError, KeyError, IndexError):
        raise BenchError(f"the answer without streaming is no completion: {answer}") from None
    if count != _CHECK_TOKENS:
        raise BenchError(f"the answer without streaming has {count} tokens, not {_CHECK_TOKENS}")
    return text


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
