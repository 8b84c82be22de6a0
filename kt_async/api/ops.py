"""Operator routes: /health, /metrics, and the chat page at /. [loop]"""

from __future__ import annotations

from importlib import resources

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from kt_async.api.openai import json_response
from kt_async.api.state import STATE

_PAGE = resources.files("kt_async.api").joinpath("page.html").read_bytes()
# The page needs nothing from elsewhere, so nothing else may be loaded into it.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def routes() -> list[web.RouteDef]:
    """Return the routes of this module."""
    return [
        web.get("/", page),
        web.get("/health", health),
        web.get("/metrics", metrics),
    ]


async def health(request: web.Request) -> web.Response:
    """GET /health: 200 when requests are served, else 503 with the reason; needs no key."""
    state = request.app[STATE]
    stats = state.engine.stats()
    answer = {
        "status": "ok",
        "model": state.settings.model_name,
        "num_running": int(stats.get("num_running", 0)),
        "num_waiting": int(stats.get("num_waiting", 0)),
    }
    if not state.engine.healthy:
        answer["status"] = "failed"
        answer["reason"] = state.engine.failure or "unknown"
    elif state.draining:
        answer["status"] = "draining"
    return json_response(answer, 200 if answer["status"] == "ok" else 503)


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics: Prometheus text."""
    return web.Response(
        body=request.app[STATE].metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST}
    )


async def page(request: web.Request) -> web.Response:
    """GET /: the chat page, one static file."""
    del request
    return web.Response(
        body=_PAGE,
        content_type="text/html",
        charset="utf-8",
        headers={"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-cache"},
    )
