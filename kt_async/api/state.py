"""What the handlers of one application share. [loop]"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from kt_async.api.settings import ApiSettings
from kt_async.engine.types import Engine
from kt_async.errors import RequestError
from kt_async.metrics import Metrics

if TYPE_CHECKING:
    from kt_async.api.run import Run


class TokenizerLike(Protocol):
    """What the API needs of text.tokenizer.Tokenizer."""

    eos_ids: frozenset[int]
    bos_id: int | None
    add_bos: bool

    def encode(self, text: str, *, add_bos: bool = False, parse_special: bool = True) -> list[int]:
        """Return the token ids of a text."""

    def token_bytes(self, token: int, /) -> bytes:
        """Return the bytes that a token stands for."""

    def is_special(self, token: int, /) -> bool:
        """Return whether the token is a control token, which is not part of an answer's text."""


class TemplateLike(Protocol):
    """What the API needs of text.template.ChatTemplate."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Return the prompt text. Raises RequestError 400 when the template refuses."""


class ApiState:
    """Engine, text tools, settings, and the requests that are running."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: TokenizerLike,
        template: TemplateLike,
        settings: ApiSettings,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template
        self.settings = settings
        self.metrics = Metrics(engine.stats)
        # Long prompts only; few threads, because they compete with the expert workers.
        self.executor = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        self.draining = False
        self.running: dict[str, Run] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def admit(self) -> None:
        """Refuse work that cannot be served now. Raises RequestError 503."""
        if self.draining:
            raise RequestError(
                503, "the server is shutting down", code="server_draining", retry_after=30
            )
        if not self.engine.healthy:
            reason = self.engine.failure or "no reason given"
            raise RequestError(503, f"the engine has failed: {reason}", code="engine_failed")

    def add(self, run: Run) -> None:
        """Register a running request."""
        self.running[run.request_id] = run
        self._idle.clear()

    def remove(self, run: Run) -> None:
        """Forget an ended request."""
        self.running.pop(run.request_id, None)
        if not self.running:
            self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing runs. Returns False when timeout_s passed first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


# Of a request: its id for logs and headers, and its stream once headers went out.
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
STREAM: web.RequestKey[web.StreamResponse] = web.RequestKey("stream", web.StreamResponse)
STATE: web.AppKey[ApiState] = web.AppKey("state", ApiState)
