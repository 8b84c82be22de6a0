"""Fixtures of the API tests: the application over a fake engine, on a real loopback socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from blockbuster import blockbuster_ctx

from kt_async.api.app import ApiSettings, make_app, make_runner
from tests.unit.api_fakes import FakeEngine, FakeTemplate, FakeTokenizer


@dataclass
class Api:
    """A served application and a client for it."""

    engine: FakeEngine
    tokenizer: FakeTokenizer
    template: FakeTemplate
    app: web.Application
    port: int
    http: aiohttp.ClientSession

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


async def serve(
    settings: ApiSettings, engine: FakeEngine | None = None
) -> tuple[Api, Callable[[], Coroutine[Any, Any, None]]]:
    tokenizer = engine.tokenizer if engine else FakeTokenizer()
    engine = engine or FakeEngine(tokenizer)
    template = FakeTemplate()
    app = make_app(engine, tokenizer, template, settings)
    runner = make_runner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    session = aiohttp.ClientSession(f"http://127.0.0.1:{port}")

    async def stop() -> None:
        await session.close()
        for generation in engine.living:
            generation.cancel()
        await runner.cleanup()

    return Api(engine, tokenizer, template, app, port, session), stop


@pytest.fixture
def api_settings() -> ApiSettings:
    return ApiSettings(model_name="fake")


@pytest_asyncio.fixture
async def api(api_settings: ApiSettings) -> AsyncIterator[Api]:
    """Override api_settings for other settings. Fails a test whose handlers block the loop."""
    api, stop = await serve(api_settings)
    with blockbuster_ctx("kt_async"):
        yield api
    await stop()


@dataclass
class Server:
    """What the SDK tests need to know about a server."""

    base_url: str  # without /v1
    model: str


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The fake server in a thread of its own, for synchronous clients."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)

    api, stop = call(serve(ApiSettings(model_name="fake")))
    yield Server(api.base_url, "fake")
    call(stop())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()
