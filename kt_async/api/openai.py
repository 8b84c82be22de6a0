"""Handlers of the OpenAI routes: chat completions, completions, models. [loop]

A handler reads and checks the body, prepares the sequences, runs them, and answers as one JSON
object or as a stream. Whatever ends it - an answer, an error, a client that left - its `finally`
frees the sequences.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import Any

import orjson
from aiohttp import web

from kt_async.api.bodies import Body, ChatBody, CompletionBody
from kt_async.api.choice import Choice
from kt_async.api.logprobs import chat_logprobs, text_logprobs
from kt_async.api.prepare import Job, prepare_chat, prepare_completion
from kt_async.api.run import Run
from kt_async.api.schema import BodyParser
from kt_async.api.sse import ChatFrames, TextFrames
from kt_async.api.state import REQUEST_ID, STATE, ApiState, TokenizerLike
from kt_async.api.stream import Stream
from kt_async.errors import RequestError
from kt_async.metrics import RequestTimes

logger = logging.getLogger(__name__)

_chat_parser = BodyParser(ChatBody)
_completion_parser = BodyParser(CompletionBody)


def routes() -> list[web.RouteDef]:
    """Return the routes of this module."""
    return [
        web.post("/v1/chat/completions", chat_completions),
        web.post("/v1/completions", completions),
        web.get("/v1/models", list_models),
        web.get("/v1/models/{id:.+}", get_model),
        web.delete("/v1/requests/{id}", cancel_request),
    ]


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    state = request.app[STATE]
    state.admit()
    body = _chat_parser.parse(await read_body(request))
    _check_model(body, state)
    job = await prepare_chat(body, state, f"chatcmpl-{uuid.uuid4().hex}")
    return await _serve(request, state, body, job)


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions."""
    state = request.app[STATE]
    state.admit()
    body = _completion_parser.parse(await read_body(request))
    _check_model(body, state)
    job = await prepare_completion(body, state, f"cmpl-{uuid.uuid4().hex}")
    return await _serve(request, state, body, job)


async def list_models(request: web.Request) -> web.Response:
    """GET /v1/models."""
    return json_response({"object": "list", "data": [_model(request.app[STATE])]})


async def get_model(request: web.Request) -> web.Response:
    """GET /v1/models/{id}."""
    state = request.app[STATE]
    if request.match_info["id"] != state.settings.model_name:
        raise _no_model(request.match_info["id"], state)
    return json_response(_model(state))


async def cancel_request(request: web.Request) -> web.Response:
    """DELETE /v1/requests/{id}: end a running request by its own or the client's id."""
    wanted = request.match_info["id"]
    state = request.app[STATE]
    runs = [r for r in state.running.values() if wanted in (r.request_id, r.client_id)]
    if not runs:
        raise RequestError(404, f"no request '{wanted[:128]}' is running", code="request_not_found")
    for run in runs:
        run.cancel()
    return json_response({"id": wanted, "object": "request", "cancelled": True})


async def read_body(request: web.Request) -> bytes:
    """Return the body. Raises RequestError 408 and 413."""
    settings = request.app[STATE].settings
    limit = settings.max_body_bytes
    if request.content_length is not None and request.content_length > limit:
        raise web.HTTPRequestEntityTooLarge(limit, request.content_length)
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            return await request.read()
    except web.RequestPayloadError as err:  # cut short, or not what Content-Encoding says
        raise RequestError(
            400, f"the body cannot be read: {' '.join(str(err).split())}", code="invalid_body"
        ) from None
    except TimeoutError:
        raise RequestError(
            408, f"the body did not arrive within {settings.body_timeout_s:g} s"
        ) from None


def json_response(value: object, status: int = 200) -> web.Response:
    """Return a JSON response."""
    return web.Response(
        body=orjson.dumps(value), status=status, content_type="application/json", charset="utf-8"
    )


def _model(state: ApiState) -> dict[str, Any]:
    info = state.engine.info
    return {
        "id": state.settings.model_name,
        "object": "model",
        "created": info.created,
        "owned_by": "kt_async",
        "root": info.model_name,
        "max_model_len": info.max_model_len,
        "meta": {
            "architecture": info.architecture,
            "vocab_size": info.vocab_size,
            **info.details,
        },
    }


def _no_model(name: str, state: ApiState) -> RequestError:
    return RequestError(
        404,
        f"the model '{name[:128]}' does not exist; this server has '{state.settings.model_name}'",
        code="model_not_found",
        param="model",
    )


def _check_model(body: Body, state: ApiState) -> None:
    settings = state.settings
    if settings.strict_model and body.model not in (None, settings.model_name):
        raise _no_model(str(body.model), state)


# ---- running a request ----


async def _serve(request: web.Request, state: ApiState, body: Body, job: Job) -> web.StreamResponse:
    """Run a job and answer it; frees its sequences whatever happens."""
    state.admit()  # draining may have begun while the body arrived
    run = job.make_run(state)
    run.client_id = request[REQUEST_ID]
    chat = isinstance(body, ChatBody)
    run.every_step = bool(body.stream)
    run.start(state.engine, job.requests)
    state.add(run)
    try:
        if body.stream:
            frames = (ChatFrames if chat else TextFrames)(
                run.request_id, int(time.time()), state.settings.model_name, len(run.choices)
            )
            return await Stream(request, state, body, run, frames).serve()
        await run.wait()
        if run.error is not None:
            raise run.error
        return json_response(_answer(body, state, run))
    finally:
        state.remove(run)
        await run.close()
        _record(run, state)


def _record(run: Run, state: ApiState) -> None:
    """Metrics and the one log line of a request."""
    queue, prefill, decode = run.times()
    started = any(c.first_s is not None for c in run.choices)
    elapsed = time.monotonic() - run.start_s
    state.metrics.observe_request(
        RequestTimes(
            prompt_tokens=sum(run.prompt_lens),
            generated_tokens=run.num_generated,
            e2e_s=elapsed,
            queue_s=queue if started else None,
            prefill_s=prefill if started else None,
            decode_s=decode if started else None,
        )
    )
    reasons = ",".join(sorted({c.finish_reason or "disconnect" for c in run.choices}))
    usage = run.usage()
    logger.info(
        "%s prompt=%d cached=%d generated=%d ttft=%s total=%.3fs rate=%.1f/s finish=%s",
        run.request_id,
        usage["prompt_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
        usage["completion_tokens"],
        f"{queue + prefill:.3f}s" if started else "-",
        elapsed,
        run.timings()["predicted_per_second"],
        reasons,
    )


def _answer(body: Body, state: ApiState, run: Run) -> dict[str, Any]:
    """Return the object of a request that does not stream."""
    chat = isinstance(body, ChatBody)
    return {
        "id": run.request_id,
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": state.settings.model_name,
        "choices": [_answer_choice(c, body, state.tokenizer) for c in run.choices],
        "usage": run.usage(speed=bool(body.return_speed)),
        "timings": run.timings(),
    }


def _answer_choice(choice: Choice, body: Body, tokenizer: TokenizerLike) -> dict[str, Any]:
    text, items = choice.take()
    answer: dict[str, Any] = {"index": choice.index}
    if isinstance(body, ChatBody):
        answer["message"] = {"role": "assistant", "content": text, "refusal": None}
        answer["logprobs"] = chat_logprobs(items, tokenizer) if body.logprobs else None
    elif isinstance(body, CompletionBody):
        answer["text"] = text
        wanted = body.logprobs is not None
        answer["logprobs"] = text_logprobs(items, tokenizer) if wanted else None
    answer["finish_reason"] = choice.finish_reason
    return answer
