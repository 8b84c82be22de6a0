"""Server-wide settings of the HTTP layer; `cli` fills them, nothing writes them later."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """What the operator decides once for all requests."""

    model_name: str
    api_keys: tuple[str, ...] = ()  # empty = no authentication
    max_new_tokens: int | None = None  # most generated tokens of a request; None = what fits
    temperature: float = 1.0  # used when a request names none; 0 = argmax
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    force_think: bool = False  # start every chat answer with think_tag
    think_tag: str = "<think>\n"
    strict_model: bool = False  # a request that names another model gets 404
    # Browser origins that may call; "*" = any, a trailing ":*" stands for any port.
    cors_origins: tuple[str, ...] = ("http://localhost:*", "http://127.0.0.1:*")
    max_body_bytes: int = 32 * 2**20
    body_timeout_s: float = 60.0  # a body that takes longer to arrive gets 408
    # A stream without output for this long sends its headers and role frame ...
    first_frame_s: float = 1.0
    # ... and then one comment line every so often, so that proxies keep the connection.
    heartbeat_s: float = 10.0
    # Unsent bytes of a stream whose client does not read; beyond it the request is cancelled.
    max_stream_backlog: int = 16 * 2**20
    max_sequences: int = 256  # most prompts x n of one request
