"""Wrong input: status, code and param of every refusal, in OpenAI's shape."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kt_async.api.app import ApiSettings, origin_allowed
from tests.unit.api_fakes import VOCAB
from tests.unit.conftest import Api

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> tuple[str, bytes]:
    return CHAT, json.dumps({"messages": USER} | fields).encode()


def messages(*items: Any) -> tuple[str, bytes]:
    return CHAT, json.dumps({"messages": items}).encode()


def text(**fields: Any) -> tuple[str, bytes]:
    return TEXT, json.dumps({"prompt": "hi"} | fields).encode()


# (request, code, param); all of them are 400.
PROBES: list[tuple[tuple[str, bytes], str, str | None]] = [
    ((CHAT, b""), "invalid_json", None),
    ((CHAT, b"{"), "invalid_json", None),
    ((CHAT, b"[]"), "invalid_value", None),
    ((CHAT, b'{"messages":[{"role":"user","content":"\xff"}]}'), "invalid_json", None),
    ((CHAT, b'{"messages":[{"role":"user","content":"\\ud800"}]}'), "invalid_json", None),
    (
        (CHAT, b'{"messages":[{"role":"user","content":"a"}],"temperature":NaN}'),
        "invalid_json",
        None,
    ),
    ((CHAT, b'{"metadata":' + b"[" * 100_000), "invalid_json", None),
    ((CHAT, b"{}"), "missing_field", "messages"),
    (chat(temprature=1), "unknown_field", "temprature"),
    (chat(temperature=2.1), "invalid_value", "temperature"),
    (chat(temperature=-0.1), "invalid_value", "temperature"),
    (chat(temperature="hot"), "invalid_value", "temperature"),
    (chat(top_p=1.5), "invalid_value", "top_p"),
    (chat(top_k=-2), "invalid_value", "top_k"),
    (chat(top_k=1.5), "invalid_value", "top_k"),
    (chat(min_p=-1), "invalid_value", "min_p"),
    (chat(seed=2**63), "invalid_value", "seed"),
    (chat(seed=2**90), "invalid_value", "seed"),
    (chat(n=0), "invalid_value", "n"),
    (chat(n=129), "invalid_value", "n"),
    (chat(n=True), "invalid_value", "n"),
    (chat(max_tokens=0), "invalid_value", "max_tokens"),
    (chat(max_tokens=-1), "invalid_value", "max_tokens"),
    (chat(max_completion_tokens=0), "invalid_value", "max_completion_tokens"),
    (chat(max_tokens=3, max_completion_tokens=4), "invalid_value", "max_tokens"),
    (chat(max_tokens=5000), "context_length_exceeded", "max_tokens"),
    (chat(min_tokens=5, max_tokens=4), "invalid_value", "min_tokens"),
    (chat(min_tokens=4096), "invalid_value", "min_tokens"),
    (chat(stop=""), "invalid_value", "stop"),
    (chat(stop=["a", ""]), "invalid_value", "stop[1]"),
    (chat(stop=["a"] * 17), "invalid_value", "stop"),
    (chat(stop="x" * 2000), "invalid_value", "stop"),
    (chat(stop=[1]), "invalid_value", "stop[0]"),
    (chat(stop_token_ids=[0, VOCAB]), "invalid_value", "stop_token_ids[1]"),
    (chat(stop_token_ids=[-1]), "invalid_value", "stop_token_ids[0]"),
    (chat(presence_penalty=3), "invalid_value", "presence_penalty"),
    (chat(frequency_penalty=-3), "invalid_value", "frequency_penalty"),
    (chat(repetition_penalty=0), "invalid_value", "repetition_penalty"),
    (chat(repetition_penalty=1.1, repeat_penalty=1.2), "invalid_value", "repeat_penalty"),
    (chat(logit_bias={"a": 1}), "invalid_value", "logit_bias"),
    (chat(logit_bias={str(VOCAB): 1}), "invalid_value", "logit_bias"),
    (chat(logit_bias={"1": 101}), "invalid_value", "logit_bias[...]"),
    (chat(logit_bias={str(i): 1 for i in range(1025)}), "invalid_value", "logit_bias"),
    (chat(logprobs=2), "invalid_value", "logprobs"),
    (chat(top_logprobs=2), "invalid_value", "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), "invalid_value", "top_logprobs"),
    (chat(stream_options={"include_usage": True}), "invalid_value", "stream_options"),
    (chat(stream=True, stream_options={"usage": 1}), "unknown_field", "stream_options.usage"),
    (chat(stream="yes"), "invalid_value", "stream"),
    (chat(priority=10**6), "invalid_value", "priority"),
    (chat(tools=[{"type": "function"}]), "unsupported_value", "tools"),
    (chat(tool_choice="auto"), "unsupported_value", "tool_choice"),
    (chat(functions=[{}]), "unsupported_value", "functions"),
    (chat(function_call="auto"), "unsupported_value", "function_call"),
    (chat(response_format={"type": "json_object"}), "unsupported_value", "response_format"),
    (chat(response_format={}), "missing_field", "response_format.type"),
    (chat(structured_outputs={"regex": "a"}), "unsupported_value", "structured_outputs"),
    (chat(guided_json={"a": 1}), "unsupported_value", "guided_json"),
    (chat(grammar="a"), "unsupported_value", "grammar"),
    (chat(modalities=["text", "audio"]), "unsupported_value", "modalities"),
    (chat(audio={"voice": "x"}), "unsupported_value", "audio"),
    (chat(prediction={"type": "content"}), "unsupported_value", "prediction"),
    (chat(reasoning_effort="low"), "unsupported_value", "reasoning_effort"),
    (chat(web_search_options={"a": 1}), "unsupported_value", "web_search_options"),
    (chat(chat_template_kwargs={"messages": []}), "invalid_value", "chat_template_kwargs.messages"),
    (chat(prompt="x"), "unknown_field", "prompt"),
    (messages(), "invalid_value", "messages"),
    (messages("x"), "invalid_value", "messages[0]"),
    (messages({"role": "robot", "content": "a"}), "invalid_value", "messages[0].role"),
    (messages({"role": "user"}), "missing_field", "messages[0].content"),
    (messages({"content": "a"}), "missing_field", "messages[0].role"),
    (messages({"role": "user", "content": 5}), "invalid_value", "messages[0].content"),
    (messages({"role": "user", "content": "a", "x": 1}), "unknown_field", "messages[0].x"),
    (
        messages({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
        "unsupported_value",
        "messages[0].content[0]",
    ),
    (
        messages({"role": "user", "content": [{"type": "video"}]}),
        "invalid_value",
        "messages[0].content[0].type",
    ),
    (
        messages(
            {
                "role": "user",
                "content": "a",
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
            }
        ),
        "invalid_value",
        "messages[0].tool_calls",
    ),
    (
        messages(
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}],
            }
        ),
        "invalid_value",
        "messages[0].tool_calls[0].function.arguments",
    ),
    (messages({"role": "user", "content": "x" * 5000}), "context_length_exceeded", "messages"),
    (text(prompt=None), "invalid_value", "prompt"),
    (text(prompt=""), "invalid_value", "prompt"),
    (text(prompt=[]), "invalid_value", "prompt"),
    (text(prompt=[[]]), "invalid_value", "prompt"),
    (text(prompt=["a", ""]), "invalid_value", "prompt[1]"),
    (text(prompt=["a", 1]), "invalid_value", "prompt"),
    (text(prompt=[1, VOCAB]), "invalid_value", "prompt[1]"),
    (text(prompt=[-1]), "invalid_value", "prompt[0]"),
    (text(prompt=[[1, 2], [-1]]), "invalid_value", "prompt[1][0]"),
    (text(prompt=["a"] * 300), "invalid_value", "n"),
    (text(prompt="x" * 5000), "context_length_exceeded", "prompt"),
    (text(max_tokens=5000), "context_length_exceeded", "max_tokens"),
    (text(best_of=2), "unsupported_value", "best_of"),
    (text(suffix="x"), "unsupported_value", "suffix"),
    (text(logprobs=21), "invalid_value", "logprobs"),
    (text(logprobs=True), "invalid_value", "logprobs"),
    (text(messages=USER), "unknown_field", "messages"),
    (messages({"role": "user", "content": "template-error"}), None, "messages"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(
    ("request_", "code", "param"), PROBES, ids=[f"{i}-{p[2]}" for i, p in enumerate(PROBES)]
)
async def test_probe(
    api: Api, request_: tuple[str, bytes], code: str | None, param: str | None
) -> None:
    path, body = request_
    async with api.http.post(path, data=body, headers={"Content-Type": "application/json"}) as got:
        answer = await got.json()
    assert got.status == 400, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["type"] == "invalid_request_error"
    if param is not None and code != "context_length_exceeded":
        assert param.removesuffix("[...]") in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 300
    assert not api.engine.submitted


async def test_messages_say_value_and_limit(api: Api) -> None:
    async def message(**fields: Any) -> str:
        path, body = chat(**fields)
        async with api.http.post(path, data=body) as got:
            return str((await got.json())["error"]["message"])

    assert await message(temperature=3) == "temperature: expected float <= 2.0 (the value is 3)"
    assert "did you mean 'temperature'" in await message(temprature=1)
    sentence = await message(max_tokens=5000)
    assert "5000" in sentence
    assert "4096" in sentence


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/embeddings", 404, "not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/requests/none", 404, "request_not_found"),
        ("PUT", "/v1/models", 405, "method_not_allowed"),
    ],
)
async def test_routes(api: Api, method: str, path: str, status: int, code: str) -> None:
    async with api.http.request(method, path) as got:
        error = (await got.json())["error"]
        assert (got.status, error["code"]) == (status, code)
        assert got.headers["X-Request-Id"]
        assert ("Allow" in got.headers) == (status == 405)


async def test_broken_gzip_is_the_clients_fault(api: Api) -> None:
    headers = {"Content-Encoding": "gzip"}
    async with api.http.post(CHAT, data=b"not gzip", headers=headers) as got:
        assert got.status == 400
        assert (await got.json())["error"]["type"] == "invalid_request_error"


async def test_queue_full(api: Api) -> None:
    api.engine.max_running = 2
    for body in ({"n": 3}, {"n": 3, "stream": True}):
        async with api.http.post(CHAT, json={"messages": USER, **body}) as got:
            error = (await got.json())["error"]
            assert (got.status, error["code"]) == (429, "queue_full")
            assert got.headers["Retry-After"] == "3"
    assert all(g.cancelled for g in api.engine.living)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("kind", "status"), [("error", 500), ("timeout", 503)])
async def test_engine_fails_first(api: Api, streamed: bool, kind: str, status: int) -> None:
    api.engine.fail_first = True
    api.engine.failure_output = (kind, "the step failed")
    async with api.http.post(CHAT, json={"messages": USER, "stream": streamed}) as got:
        error = (await got.json())["error"]
        assert got.status == status
        assert error["message"] == "the step failed"


async def test_engine_fails_in_the_middle(api: Api) -> None:
    api.engine.fail_after = 3
    async with api.http.post(CHAT, json={"messages": USER, "stream": True}) as got:
        assert got.status == 200
        raw = await got.read()
    last = raw.split(b"\n\n")[-2]
    event, data = last.split(b"\n")
    assert event == b"event: error"
    error = json.loads(data.removeprefix(b"data: "))["error"]
    assert error == {
        "message": "the step failed",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    assert b"Hello" in raw
    assert b"[DONE]" not in raw


async def test_engine_is_gone(api: Api) -> None:
    api.engine.failure = "out of memory"
    async with api.http.post(CHAT, json={"messages": USER}) as got:
        assert got.status == 503
        assert "out of memory" in (await got.json())["error"]["message"]
    async with api.http.get("/health") as got:
        assert got.status == 503
        assert (await got.json())["status"] == "failed"


async def test_a_bug_is_a_500_and_the_server_goes_on(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(api.tokenizer, "encode", lambda text: 1 / 0)
        async with api.http.post(CHAT, json={"messages": USER}) as got:
            assert got.status == 500
            assert (await got.json())["error"]["message"] == "internal error"
    assert "ZeroDivisionError" in caplog.text
    async with api.http.post(CHAT, json={"messages": USER}) as got:
        assert got.status == 200


class TestLimits:
    @pytest.fixture
    def api_settings(self) -> ApiSettings:
        return ApiSettings(
            model_name="fake", strict_model=True, max_body_bytes=1000, body_timeout_s=0.2
        )

    async def test_model(self, api: Api) -> None:
        async with api.http.post(CHAT, json={"messages": USER, "model": "other"}) as got:
            error = (await got.json())["error"]
            assert (got.status, error["code"], error["param"]) == (404, "model_not_found", "model")
        for body in ({"model": "fake"}, {}):
            async with api.http.post(CHAT, json={"messages": USER, **body}) as got:
                assert got.status == 200

    @pytest.mark.parametrize("chunked", [False, True])
    async def test_size(self, api: Api, chunked: bool) -> None:
        async def parts() -> Any:
            for _ in range(30):
                yield b"x" * 100

        data = parts() if chunked else b"x" * 3000
        async with api.http.post(CHAT, data=data) as got:
            assert got.status == 413
            assert "1000 bytes" in (await got.json())["error"]["message"]

    async def test_slow_body(self, api: Api) -> None:
        import asyncio

        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        status = await reader.readline()
        assert b" 408 " in status
        writer.close()
        await writer.wait_closed()


class TestKeys:
    @pytest.fixture
    def api_settings(self) -> ApiSettings:
        return ApiSettings(model_name="fake", api_keys=("first", "second"))

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Bearer "}, 401),
            ({"Authorization": "Basic first"}, 401),
            ({"Authorization": "Bearer first"}, 200),
            ({"Authorization": "bearer second"}, 200),
            ({"X-Api-Key": "second"}, 200),
        ],
    )
    async def test_key(self, api: Api, headers: dict[str, str], status: int) -> None:
        for path in ("/v1/models", "/metrics"):
            async with api.http.get(path, headers=headers) as got:
                assert got.status == status
                if status == 401:
                    assert (await got.json())["error"]["code"] == "invalid_api_key"
                    assert got.headers["WWW-Authenticate"] == "Bearer"
        for path in ("/health", "/"):
            async with api.http.get(path) as got:
                assert got.status == 200


def test_origins() -> None:
    allowed = ("http://localhost:*", "https://chat.example")
    assert origin_allowed("http://localhost:3000", allowed)
    assert origin_allowed("http://localhost", allowed)
    assert origin_allowed("https://chat.example", allowed)
    assert not origin_allowed("http://localhost.evil.example:80", allowed)
    assert not origin_allowed("http://localhost:3000.evil", allowed)
    assert not origin_allowed("https://evil.example", allowed)
    assert origin_allowed("https://evil.example", ("*",))
