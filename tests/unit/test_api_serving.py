"""Disconnects, cancelling, draining, slow readers, health, metrics, CORS."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from kt_async.api.app import ApiSettings, drain
from kt_async.api.state import STATE
from kt_async.log import setup_logging
from tests.unit.api_fakes import FakeGeneration
from tests.unit.conftest import Api

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]


async def until(condition: Any, limit_s: float = 5.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def open_request(api: Api, body: dict[str, Any]) -> tuple[Any, Any]:
    """Send a chat over a bare connection, so that the test decides when it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    data = json.dumps({"messages": USER} | body).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data)
        + data
    )
    await writer.drain()
    return reader, writer


def endless(api: Api, step_s: float = 0.001) -> None:
    api.engine.reply = list(b"word ")
    api.engine.step_s = step_s


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["queued", "decode"])
@pytest.mark.parametrize("n", [1, 3])
async def test_disconnect_frees_the_sequences(api: Api, stream: bool, phase: str, n: int) -> None:
    endless(api)
    api.engine.paused = phase == "queued"
    _, writer = await open_request(api, {"stream": stream, "n": n, "max_tokens": 4000})
    await until(lambda: len(api.engine.living) == n)
    if phase == "decode":
        await until(lambda: api.engine.living[0].position > 3)
    writer.close()
    await until(lambda: len(api.engine.cancelled) == n)
    await until(lambda: not api.engine.living)
    await until(lambda: not api.app[STATE].running)


async def test_one_clients_disconnect_leaves_the_others(api: Api) -> None:
    endless(api)
    _, gone = await open_request(api, {"stream": True, "max_tokens": 4000})
    reader, stays = await open_request(api, {"stream": True, "max_tokens": 50})
    await until(lambda: len(api.engine.living) == 2)
    gone.close()
    raw = await reader.readuntil(b"[DONE]")
    assert b'"finish_reason":"length"' in raw
    stays.close()


@pytest.mark.parametrize("by", ["own", "client"])
async def test_delete_ends_a_request(api: Api, by: str) -> None:
    endless(api)
    body = {"messages": USER, "max_tokens": 4000, "stream": True}
    async with api.http.post(CHAT, json=body, headers={"X-Request-Id": "mine-1"}) as got:
        assert got.headers["X-Request-Id"] == "mine-1"
        first = await got.content.readline()
        wanted = json.loads(first[6:])["id"] if by == "own" else "mine-1"
        async with api.http.delete(f"/v1/requests/{wanted}") as answer:
            assert answer.status == 200
        raw = await got.read()
    assert b'"finish_reason":"abort"' in raw
    assert raw.endswith(b"data: [DONE]\n\n")
    await until(lambda: not api.engine.living)


async def test_request_id_is_made_when_there_is_none_or_a_bad_one(api: Api) -> None:
    seen = set()
    for headers in ({}, {"X-Request-Id": "with space"}, {"X-Request-Id": "x" * 200}):
        async with api.http.get("/v1/models", headers=headers) as got:
            seen.add(got.headers["X-Request-Id"])
    assert len(seen) == 3
    assert all(len(i) == 32 for i in seen)


class TestSlowReader:
    @pytest.fixture
    def api_settings(self) -> ApiSettings:
        # The name is in every frame: 32 MB of frames, more than the kernel's buffers hold.
        return ApiSettings(model_name="m" * 2000)

    async def test_gets_fewer_larger_frames(self, api: Api) -> None:
        """Nobody reads while thousands of tokens come; the engine finishes all the same."""
        api.engine.reply = list(b"x" * 100)
        reader, writer = await open_request(api, {"stream": True, "max_tokens": 4000, "n": 4})
        await until(lambda: len(api.engine.submitted) == 4)
        await until(lambda: not api.engine.living, 30)
        parts = [await reader.readuntil(b"\n\n")]
        while b"[DONE]" not in parts[-1]:
            parts.append(await reader.readuntil(b"\n\n"))
        raw = b"".join(parts)
        assert raw.count(b'"finish_reason":"length"') == 4
        text = b"".join(
            p.split(b'"content":"')[1].split(b'"')[0] for p in parts if b'"content":"' in p
        )
        assert text == b"x" * 16_000
        assert raw.count(b'"content":"x') < 16_000 * 0.8
        writer.close()


class TestImpatient:
    @pytest.fixture
    def api_settings(self) -> ApiSettings:
        return ApiSettings(
            model_name="fake", first_frame_s=0.02, heartbeat_s=0.02, max_stream_backlog=1000
        )

    async def test_a_queued_stream_shows_life(self, api: Api) -> None:
        api.engine.paused = True
        async with api.http.post(CHAT, json={"messages": USER, "stream": True, "n": 2}) as got:
            assert b'"role":"assistant"' in await got.content.readline()
            await got.content.readline()
            assert b'"index":1' in await got.content.readline()
            await got.content.readline()
            assert (await got.content.readline()).startswith(b":")
            api.engine.paused = False
            raw = await got.read()
        assert b'"role"' not in raw  # only once
        assert raw.endswith(b"data: [DONE]\n\n")

    async def test_late_failure_is_an_event(self, api: Api) -> None:
        api.engine.paused = True
        async with api.http.post(CHAT, json={"messages": USER, "stream": True}) as got:
            await got.content.readline()
            api.engine.fail_first = True
            api.engine.failure_output = ("timeout", "queued for 60 s")
            api.engine.paused = False
            raw = await got.read()
        assert b"event: error\n" in raw
        assert b"queued for 60 s" in raw

    async def test_backlog_limit_cancels(self, api: Api) -> None:
        endless(api, 0.0)
        _, writer = await open_request(
            api,
            {"stream": True, "max_tokens": 4000, "n": 100, "logprobs": True, "top_logprobs": 20},
        )
        await until(lambda: len(api.engine.cancelled) == 100, 30)
        writer.close()
        await until(lambda: not api.app[STATE].running)


async def test_drain_lets_streams_finish(api: Api) -> None:
    endless(api)
    body = {"messages": USER, "stream": True, "max_tokens": 60}
    async with api.http.post(CHAT, json=body) as got:
        await got.content.readline()
        waiting = asyncio.create_task(drain(api.app, 20))
        await asyncio.sleep(0)
        async with api.http.post(CHAT, json=body) as refused:
            assert refused.status == 503
            assert "Retry-After" in refused.headers
            assert (await refused.json())["error"]["code"] == "server_draining"
        async with api.http.get("/health") as health:
            assert health.status == 503
            assert (await health.json())["status"] == "draining"
        raw = await got.read()
        assert b'"finish_reason":"length"' in raw
        assert await waiting


async def test_drain_aborts_what_takes_too_long(api: Api) -> None:
    endless(api)
    body = {"messages": USER, "stream": True, "max_tokens": 4000}
    async with api.http.post(CHAT, json=body) as got:
        await got.content.readline()
        assert not await drain(api.app, 0.05)
        raw = await got.read()
    assert b'"finish_reason":"abort"' in raw
    assert raw.endswith(b"data: [DONE]\n\n")


async def test_models(api: Api) -> None:
    async with api.http.get("/v1/models") as got:
        listing = await got.json()
    async with api.http.get("/v1/models/fake") as got:
        model = await got.json()
    assert listing == {"object": "list", "data": [model]}
    assert (model["id"], model["object"], model["owned_by"]) == ("fake", "model", "kt_async")
    assert model["max_model_len"] == 4096
    assert model["meta"]["quantization"] == "none"


async def test_health_and_page(api: Api) -> None:
    async with api.http.get("/health") as got:
        assert (got.status, (await got.json())["status"]) == (200, "ok")
    async with api.http.get("/") as got:
        page = await got.text()
        assert got.content_type == "text/html"
        assert "default-src 'none'" in got.headers["Content-Security-Policy"]
    assert "https://" not in page
    assert "http://" not in page  # nothing is loaded from elsewhere


def samples(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


async def test_metrics_agree_with_the_usages(api: Api) -> None:
    prompt = generated = 0
    for body in ({}, {"n": 2}, {"max_tokens": 3}):
        async with api.http.post(CHAT, json={"messages": USER, **body}) as got:
            usage = (await got.json())["usage"]
            prompt += usage["prompt_tokens"]
            generated += usage["completion_tokens"]
    async with api.http.get("/metrics") as got:
        assert got.content_type == "text/plain"
        values = samples(await got.text())
    assert values["kt_async:prompt_tokens_total"] == prompt
    assert values["kt_async:generation_tokens_total"] == generated
    assert values['kt_async:request_success_total{finished_reason="stop"}'] == 3
    assert values['kt_async:request_success_total{finished_reason="length"}'] == 1
    assert values["kt_async:e2e_request_latency_seconds_count"] == 3
    assert values["kt_async:time_to_first_token_seconds_count"] == 4
    assert values["kt_async:inter_token_latency_seconds_count"] == generated - 4
    assert values["kt_async:num_requests_running"] == 0
    assert values["kt_async:kv_cache_usage_perc"] == 0
    assert values["kt_async:prefix_cache_hits_total"] == 5
    assert values["kt_async:engine_steps_total"] == 7
    assert values["kt_async:runner_run_ns"] == 2.5e9
    assert values["kt_async:runner_kv_bytes"] == 1024
    assert values['kt_async:http_responses_total{status="200"}'] == 3


async def test_a_disconnect_is_counted(api: Api) -> None:
    endless(api)
    _, writer = await open_request(api, {"stream": True, "max_tokens": 4000})
    await until(lambda: api.engine.living)
    writer.close()
    await until(lambda: not api.app[STATE].running and not api.engine.living)
    async with api.http.get("/metrics") as got:
        values = samples(await got.text())
    assert values['kt_async:request_success_total{finished_reason="abort"}'] == 1
    assert values["kt_async:e2e_request_latency_seconds_count"] == 1


async def test_cors(api: Api) -> None:
    origin = {"Origin": "http://localhost:3000"}
    preflight = origin | {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-extra",
    }
    async with api.http.options(CHAT, headers=preflight) as got:
        assert got.status == 204
        assert got.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
        assert got.headers["Access-Control-Allow-Headers"] == "authorization,x-extra"
        assert "POST" in got.headers["Access-Control-Allow-Methods"]
    for stream in (False, True):
        body = {"messages": USER, "stream": stream}
        async with api.http.post(CHAT, json=body, headers=origin) as got:
            assert got.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
            await got.read()
    async with api.http.get("/v1/models", headers={"Origin": "http://evil.example"}) as got:
        assert "Access-Control-Allow-Origin" not in got.headers
        assert got.headers["Vary"] == "Origin"


async def test_http_1_0_and_keep_alive(api: Api) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(b"GET /health HTTP/1.0\r\n\r\n")
    assert b"200 OK" in await reader.read()
    writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    for _ in range(2):
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b"}")
    writer.close()


async def test_one_write_per_step(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many choices a step serves, the client gets one write."""
    from kt_async.api import sse

    writes = []
    write = sse.EventWriter.write

    async def counted(self: sse.EventWriter, frames: bytes) -> None:
        writes.append(frames)
        await write(self, frames)

    monkeypatch.setattr(sse.EventWriter, "write", counted)
    async with api.http.post(CHAT, json={"messages": USER, "stream": True, "n": 8}) as got:
        await got.read()
    assert len(writes) <= len(api.engine.reply) + 1
    assert writes[1].count(b"data: ") == 8


async def test_the_engines_exception_ends_one_request(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(self: FakeGeneration) -> None:
        raise KeyError("x")

    with monkeypatch.context() as patch:
        patch.setattr(FakeGeneration, "__anext__", broken)
        async with api.http.post(CHAT, json={"messages": USER}) as got:
            assert got.status == 500
    assert "KeyError" in caplog.text
    await until(lambda: not api.engine.living)


def test_log_lines_carry_the_request_id(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("kt_async")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        setup_logging("INFO", json=True)
        logging.getLogger("kt_async.x").info("hello %d", 5)
        setup_logging("warning")
        logger.info("not shown")
        logger.warning("plain")
        with pytest.raises(ValueError, match="loud"):
            setup_logging("loud")
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    first, second = capsys.readouterr().err.splitlines()
    assert json.loads(first)["message"] == "hello 5"
    assert json.loads(first)["request_id"] == "-"
    assert second.endswith("W kt_async [-] plain")
