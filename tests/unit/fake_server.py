"""A tiny OpenAI-compatible server for the benchmarks' tests: deterministic text, chosen faults.

Runs inside a test (make_app) or as a process of its own: fake_server.py PORT [fault].
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import zlib
from typing import Any

from aiohttp import web

FAULTS = (
    "short",
    "no_done",
    "error_frame",
    "not_json",
    "refuse",
    "batch_dependent",
    "no_usage",
    "dies",
)
_GAP_S = 0.001


class _State:
    """Per server: the fault and how many requests run at once."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.running = 0
        self.steps = 0


_STATE: web.AppKey[_State] = web.AppKey("state", _State)


def _token(prompt: str, index: int) -> str:
    value = zlib.crc32(f"{prompt}/{index}".encode())
    return f"w{value % 997}" + ("\n" if value % 7 == 0 else " ")


def _prompt_of(body: dict[str, Any]) -> tuple[str, int]:
    """(text that stands for the prompt, its tokens): a token per id, two per word."""
    if "messages" in body:
        text = "".join(message["content"] for message in body["messages"])
        return text, 4 + 2 * len(text.split())
    prompt = body["prompt"]
    if isinstance(prompt, list):
        return str(prompt), len(prompt)
    return prompt, 2 * len(prompt.split())


def _choice(chat: bool, text: str, finish: str | None, stream: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
    if not chat:
        choice["text"] = text
    elif stream:
        choice["delta"] = {"content": text} if text else {}
    else:
        choice["message"] = {"role": "assistant", "content": text}
    return choice


async def _complete(request: web.Request) -> web.StreamResponse:
    state, body = request.app[_STATE], await request.json()
    if state.fault == "refuse":
        return web.json_response({"error": {"message": "the queue is full"}}, status=429)
    if state.fault == "dies":
        sys.stderr.write("expert 7 is gone")
        os._exit(3)
    chat = "messages" in body
    prompt, num_prompt = _prompt_of(body)
    count = body["max_tokens"] - (1 if state.fault == "short" else 0)
    usage: dict[str, Any] = {"prompt_tokens": num_prompt, "completion_tokens": count}
    if body.get("return_speed"):
        usage |= {"prefill_time": 0.5, "decode_time": 0.25}
    state.running += 1
    try:
        await asyncio.sleep(_GAP_S)
        if state.fault == "batch_dependent" and state.running > 1:
            prompt += "!"
        words = [_token(prompt, i) for i in range(count)]
        if not body.get("stream"):
            kind = "chat.completion" if chat else "text_completion"
            choice = _choice(chat, "".join(words), "length", stream=False)
            return web.json_response({"object": kind, "choices": [choice], "usage": usage})
        return await _stream(request, words, chat, usage)
    finally:
        state.running -= 1


async def _stream(
    request: web.Request, words: list[str], chat: bool, usage: dict[str, Any]
) -> web.StreamResponse:
    state = request.app[_STATE]
    reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await reply.prepare(request)
    kind = "chat.completion.chunk" if chat else "text_completion"

    async def send(choices: list[Any], extra: dict[str, Any]) -> None:
        frame = json.dumps({"object": kind, "choices": choices} | extra)
        await reply.write(f"data: {frame}\n\n".encode())

    await reply.write(b": ping\n\n")
    for word in words:
        await send([_choice(chat, word, None, stream=True)], {})
        state.steps += 1
        await asyncio.sleep(_GAP_S)
    if state.fault == "error_frame":
        await reply.write(b'data: {"error": {"message": "out of pages"}}\n\n')
    if state.fault == "not_json":
        await reply.write(b"data: {oops\n\n")
    await send([_choice(chat, "", "length", stream=True)], {})
    if state.fault != "no_usage":
        await send([], {"usage": usage})
    if state.fault != "no_done":
        await reply.write(b"data: [DONE]\n\n")
    await reply.write_eof()
    return reply


async def _models(request: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "fake", "meta": {"n_vocab": 1000}}]})


async def _health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def _metrics(request: web.Request) -> web.Response:
    steps = request.app[_STATE].steps
    text = (
        "# TYPE kt_async:engine_steps counter\n"
        f"kt_async:engine_steps_total {steps}\nkt_async:engine_host_ns {steps * 250_000.0}\n"
    )
    return web.Response(text=text)


def make_app(fault: str = "") -> web.Application:
    """The application; fault: one of FAULTS or nothing."""
    app = web.Application()
    app[_STATE] = _State(fault)
    app.router.add_post("/v1/completions", _complete)
    app.router.add_post("/v1/chat/completions", _complete)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/health", _health)
    app.router.add_get("/metrics", _metrics)
    return app


if __name__ == "__main__":
    web.run_app(
        make_app("".join(sys.argv[2:])), host="127.0.0.1", port=int(sys.argv[1]), print=None
    )
