"""The aiohttp application: one boundary around all handlers, CORS, keys, draining. [loop]

make_app gives the application, make_runner one that serves it with the right switches:
handler_cancellation must be on, or a client that leaves would not end its request.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Sequence
from typing import cast

from aiohttp import web
from aiohttp.typedefs import Handler

from kt_async import log
from kt_async.api import openai, ops
from kt_async.api.errors import error_response, from_http
from kt_async.api.settings import ApiSettings
from kt_async.api.state import REQUEST_ID, STATE, STREAM, ApiState, TemplateLike, TokenizerLike
from kt_async.engine.types import Engine
from kt_async.errors import KtError, RequestError

__all__ = ["ApiSettings", "begin_drain", "drain", "make_app", "make_runner"]

logger = logging.getLogger(__name__)

_OPEN_PATHS = frozenset({"/", "/health"})  # the page is static and asks for the key itself
_ABORT_GRACE_S = 5.0
_ID = re.compile(r"[\x21-\x7e]{1,128}")


def make_app(
    engine: Engine, tokenizer: TokenizerLike, template: TemplateLike, settings: ApiSettings
) -> web.Application:
    """Return the application that serves an engine."""
    app = web.Application(
        middlewares=[boundary], client_max_size=settings.max_body_bytes, logger=logger
    )
    app[STATE] = ApiState(engine, tokenizer, template, settings)
    app.add_routes(openai.routes())
    app.add_routes(ops.routes())
    app.on_response_prepare.append(_add_headers)
    app.on_cleanup.append(_clean_up)
    return app


def make_runner(app: web.Application) -> web.AppRunner:
    """Return the runner to serve the application with; the caller adds sites and cleans up."""
    return web.AppRunner(
        app,
        handle_signals=False,
        handler_cancellation=True,
        access_log=None,  # each request logs one line of its own
        shutdown_timeout=_ABORT_GRACE_S,
    )


def begin_drain(app: web.Application) -> None:
    """Refuse new requests with 503 from now on; running ones go on."""
    app[STATE].draining = True


async def drain(app: web.Application, timeout_s: float) -> bool:
    """Refuse new requests and wait for the running ones; after timeout_s end them with "abort".

    Returns whether all ended by themselves.
    """
    begin_drain(app)
    state = app[STATE]
    if await state.wait_idle(timeout_s):
        return True
    for run in list(state.running.values()):
        run.cancel()
    await state.wait_idle(_ABORT_GRACE_S)
    return False


@web.middleware
async def boundary(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request its id, check the key, and turn every error into a response."""
    state = request.app[STATE]
    given = request.headers.get("X-Request-Id", "")
    request[REQUEST_ID] = given if _ID.fullmatch(given) else uuid.uuid4().hex
    token = log.request_id.set(request[REQUEST_ID])
    try:
        response = await _answer(request, handler, state)
    finally:
        log.request_id.reset(token)
    state.metrics.count_response(response.status)
    return response


async def _answer(request: web.Request, handler: Handler, state: ApiState) -> web.StreamResponse:
    try:
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return web.Response(status=204)
        if request.path not in _OPEN_PATHS:
            check_key(request, state.settings.api_keys)
        response: web.StreamResponse = await handler(request)
        return response
    except RequestError as err:
        return error_response(err)
    except web.HTTPException as err:
        return from_http(err, request, state.settings.max_body_bytes)
    except (ConnectionError, asyncio.CancelledError):
        raise  # the client has gone, nobody is left to answer
    except KtError as err:
        return error_response(RequestError(500, str(err), code="engine_error"))
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        if (stream := request.get(STREAM)) is not None:
            if request.transport is not None:
                request.transport.close()  # the client must see that the answer is cut
            return cast(web.StreamResponse, stream)  # aiohttp types get() as Any
        return error_response(RequestError(500, "internal error", code="internal_error"))


def check_key(request: web.Request, keys: Sequence[str]) -> None:
    """Refuse a request without one of the keys. Raises RequestError 401."""
    if not keys:
        return
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = request.headers.get("X-Api-Key", "")
    digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
    found = False
    for key in keys:  # all of them, so that the time says nothing about which one was near
        found |= hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest())
    if not found:
        what = "wrong API key" if given else "no API key: send 'Authorization: Bearer <key>'"
        raise RequestError(401, what, code="invalid_api_key")


def origin_allowed(origin: str, allowed: Sequence[str]) -> bool:
    """Return whether a browser page of this origin may call."""
    for pattern in allowed:
        if pattern in ("*", origin):
            return True
        if pattern.endswith(":*"):
            host, _, port = origin.rpartition(":")
            if origin == pattern[:-2] or (host == pattern[:-2] and port.isdecimal()):
                return True
    return False


async def _clean_up(app: web.Application) -> None:
    app[STATE].executor.shutdown(wait=False, cancel_futures=True)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Signal: headers that every response has, streams and errors included."""
    response.headers["X-Request-Id"] = request.get(REQUEST_ID, "")
    origin = request.headers.get("Origin")
    if origin is None:
        return
    response.headers["Vary"] = "Origin"
    if not origin_allowed(origin, request.app[STATE].settings.cors_origins):
        return
    response.headers["Access-Control-Allow-Origin"] = origin
    response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
    if request.method == "OPTIONS":
        wanted = request.headers.get("Access-Control-Request-Headers", "")
        response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE, OPTIONS"
        response.headers["Access-Control-Allow-Headers"] = wanted or "Authorization, Content-Type"
        response.headers["Access-Control-Max-Age"] = "600"
