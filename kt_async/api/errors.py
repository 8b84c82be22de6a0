"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}. Pure functions."""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import web

from kt_async.errors import RequestError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_CODES = {404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "request_too_large"}


def error_body(err: RequestError) -> dict[str, Any]:
    """Return the object under `error`."""
    fallback = "server_error" if err.status >= 500 else "invalid_request_error"
    return {
        "message": str(err),
        "type": _TYPES.get(err.status, fallback),
        "param": err.param,
        "code": err.code or _CODES.get(err.status),
    }


def error_response(err: RequestError) -> web.Response:
    """Return the HTTP response for an error."""
    response = web.Response(
        status=err.status,
        body=orjson.dumps({"error": error_body(err)}),
        content_type="application/json",
        charset="utf-8",
    )
    if err.retry_after is not None:
        response.headers["Retry-After"] = str(err.retry_after)
    if err.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def from_http(err: web.HTTPException, request: web.Request, max_body: int) -> web.Response:
    """Return the response for an error that aiohttp raised itself."""
    path = request.path[:200]
    if isinstance(err, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(err.allowed_methods))
        message = f"{request.method} is not allowed for {path}; allowed: {allowed}"
    elif err.status == 404:
        message = f"there is no {path} here"
    elif err.status == 413:
        message = f"the body exceeds {max_body} bytes"
    else:
        message = err.reason
    response = error_response(RequestError(err.status, message))
    if "Allow" in err.headers:
        response.headers["Allow"] = err.headers["Allow"]
    return response
