"""A failing engine in the real server: clients are told, /health says so, then restart or exit."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from kt_async import cli, serve
from kt_async.engine.runner import Runner
from kt_async.errors import EngineError, NativeError
from kt_async.ffi import structs
from kt_async.ffi.scheduler import Scheduler
from tests.e2e.conftest import free_port

CHAT = {"messages": [{"role": "user", "content": "What is kt_async?"}], "temperature": 0}
# The model's own end of text would leave too few steps to fail in.
LONG = CHAT | {"stream": True, "max_tokens": 400, "ignore_eos": True}


class Fault:
    """Breaks a step of whatever engine runs when it is armed, as a lost device would."""

    def __init__(self) -> None:
        self.armed = threading.Event()
        self.loads = 0
        self.may_load = threading.Event()
        self.may_load.set()

    def load(self, ready: serve.Prepared) -> tuple[Scheduler, Runner]:
        assert self.may_load.wait(30)
        self.loads += 1
        scheduler, runner = real_load(ready)
        run = runner.run

        def faulty(*args: Any) -> None:
            if self.armed.is_set():
                self.armed.clear()
                raise NativeError(structs.KT_ERR_INTERNAL, "injected failure")
            run(*args)

        runner.run = faulty  # type: ignore[method-assign]
        return scheduler, runner


real_load = serve.load_engine


class Running:
    """A server in this process."""

    def __init__(self, port: int, session: aiohttp.ClientSession, task: asyncio.Task[None]) -> None:
        self.url, self.session, self.task = f"http://127.0.0.1:{port}", session, task

    async def health(self) -> tuple[int, dict[str, Any]]:
        async with self.session.get(self.url + "/health") as answer:
            return answer.status, await answer.json()

    async def until_healthy(self) -> None:
        async with asyncio.timeout(60):
            while not self.task.done():
                try:
                    if (await self.health())[0] == 200:
                        return
                except aiohttp.ClientConnectionError:
                    pass
                await asyncio.sleep(0.02)
        await self.task

    async def chat(self) -> str:
        async with self.session.post(self.url + "/v1/chat/completions", json=CHAT) as answer:
            assert answer.status == 200
            body = await answer.json()
        return str(body["choices"][0]["message"]["content"])

    async def stream(self, at_first_token: Callable[[], None]) -> list[dict[str, Any]]:
        """The events of a long answer, the error among them."""
        events: list[dict[str, Any]] = []
        async with self.session.post(self.url + "/v1/chat/completions", json=LONG) as answer:
            assert answer.status == 200
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    events.append(json.loads(line[6:]))
                    if len(events) == 2:
                        at_first_token()
        return events


@asynccontextmanager
async def running(
    fault: Fault, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> AsyncIterator[Running]:
    monkeypatch.setattr(serve, "load_engine", fault.load)
    port = free_port()
    config = cli.parse(["--port", str(port), "--max_batch_size", "4", *flags], {})
    task = asyncio.create_task(serve.serve(config))
    async with aiohttp.ClientSession() as session:
        server = Running(port, session, task)
        try:
            await server.until_healthy()
            yield server
        finally:
            if not task.done():
                signal.raise_signal(signal.SIGTERM)
            await asyncio.wait([task], timeout=30)


async def test_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault()
    async with running(fault, monkeypatch) as server:
        before = await server.chat()
        fault.may_load.clear()
        begun: list[int] = []

        def break_when_both_have_begun() -> None:
            begun.append(1)
            if len(begun) == 2:
                fault.armed.set()

        both = [server.stream(break_when_both_have_begun) for _ in range(2)]
        events = await asyncio.gather(*both)
        for one in events:
            assert "injected failure" in one[-1]["error"]["message"]
        status, body = await server.health()
        assert (status, body["status"], body["reason"]) == (503, "failed", "injected failure")
        async with server.session.post(server.url + "/v1/chat/completions", json=CHAT) as answer:
            assert answer.status == 503
            assert "injected failure" in (await answer.json())["error"]["message"]
        async with server.session.get(server.url + "/metrics") as answer:
            assert answer.status == 200
        fault.may_load.set()
        await server.until_healthy()
        assert await server.chat() == before
        assert fault.loads == 2
    await server.task


async def test_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault()
    async with running(fault, monkeypatch, "--on_engine_failure", "exit") as server:
        events = await server.stream(fault.armed.set)
        assert "injected failure" in events[-1]["error"]["message"]
        with pytest.raises(EngineError, match="the engine has failed: injected failure"):
            await asyncio.wait_for(server.task, 30)
    assert fault.loads == 1


async def test_failing_again_and_again_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault()
    async with running(fault, monkeypatch) as server:
        for _ in range(3):
            await server.stream(fault.armed.set)
            await server.until_healthy()
        await server.stream(fault.armed.set)
        with pytest.raises(EngineError, match="restarted 3 times within 10 minutes"):
            await asyncio.wait_for(server.task, 30)
    assert fault.loads == 4


async def test_a_failing_restart_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault()
    async with running(fault, monkeypatch) as server:

        def broken(ready: serve.Prepared) -> tuple[Scheduler, Runner]:
            raise EngineError("no memory")

        monkeypatch.setattr(serve, "load_engine", broken)
        await server.stream(fault.armed.set)
        with pytest.raises(EngineError, match="restarting it failed too: no memory"):
            await asyncio.wait_for(server.task, 30)
