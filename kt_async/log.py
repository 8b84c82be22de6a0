"""Logging set-up: one line per record, plain or JSON, with the request id where there is one.

`cli` calls setup_logging once. Prompt text never reaches a log record.
"""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from typing import TextIO

import orjson

# Set by the API for the task that serves a request.
request_id: ContextVar[str] = ContextVar("request_id", default="-")

LEVELS = ("debug", "info", "warning", "error")


class _WithRequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON text."""
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": getattr(record, "request_id", "-"),
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(entry, default=str).decode()


def setup_logging(level: str = "info", *, json: bool = False, stream: TextIO | None = None) -> None:
    """Send the package's records to stream (stderr when None), replacing earlier handlers.

    level: one of LEVELS, any case. Raises ValueError for another one.
    """
    if level.lower() not in LEVELS:
        raise ValueError(f"log level '{level}' is not one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.addFilter(_WithRequestId())
    if json:
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname).1s %(name)s [%(request_id)s] %(message)s")
        )
    logger = logging.getLogger("kt_async")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
