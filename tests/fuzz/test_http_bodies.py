"""Random bodies: never a 5xx, always OpenAI's error shape, nothing left running."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kt_async.api.app import ApiSettings
from kt_async.api.bodies import ChatBody, CompletionBody
from kt_async.api.state import STATE
from tests.unit.conftest import Api, serve

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
NUMBERS = st.sampled_from([0, 1, -1, 0.5, 2, 16, 128, 257, 2**31, 2**63, 2**64, -0.0, 1e308])
VALUES = st.one_of(JSON, NUMBERS, st.booleans())
CONTENT = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.fixed_dictionaries(
            {"type": st.sampled_from(["text", "image_url", "x"])},
            optional={"text": st.text(max_size=9)},
        ),
        max_size=3,
    ),
    VALUES,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "x"])},
    optional={"content": CONTENT, "name": VALUES, "tool_calls": VALUES, "tool_call_id": VALUES},
)
IDS = st.lists(st.integers(-2, 300), max_size=6)
PROMPT = st.one_of(
    st.text(max_size=30),
    IDS,
    st.lists(st.text(max_size=8), max_size=4),
    st.lists(IDS, max_size=4),
    VALUES,
)
# Values that are often valid, so that the bodies get past the first check.
LIKELY = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "stop": st.one_of(st.text(max_size=4), st.lists(st.text(max_size=3), max_size=18)),
    "n": st.integers(0, 6),
    "max_tokens": st.integers(0, 40),
    "min_tokens": st.integers(0, 40),
    "stream": st.booleans(),
    "echo": st.booleans(),
    "logit_bias": st.dictionaries(
        st.text("0123456789\u0663-", max_size=4), st.floats(-101, 101), max_size=3
    ),
    "seed": st.integers(-(2**64), 2**64),
    "stop_token_ids": IDS,
    "ignore_eos": st.booleans(),
    "return_speed": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "chat_template_kwargs": st.dictionaries(st.text(max_size=5), JSON, max_size=2),
}


def fields(kind: Any, first: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    names = [name for name in kind.__struct_fields__ if name not in first]
    known = st.sampled_from(names).flatmap(
        lambda name: st.tuples(st.just(name), LIKELY.get(name, VALUES))
    )
    likely = st.sampled_from([n for n in names if n in LIKELY]).flatmap(
        lambda name: st.tuples(st.just(name), LIKELY[name])
    )
    extra = st.lists(st.one_of(likely, likely, known), max_size=5).map(dict)
    return st.tuples(st.fixed_dictionaries(first), extra).map(lambda pair: pair[0] | pair[1])


CHAT_BODY = fields(ChatBody, {"messages": st.lists(MESSAGE, max_size=3)})
TEXT_BODY = fields(CompletionBody, {"prompt": PROMPT})


class Fuzzed:
    """The fake server on a loop of its own, driven synchronously by hypothesis."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.api, self.stop = self.loop.run_until_complete(
            serve(ApiSettings(model_name="fake", max_new_tokens=40))
        )
        self.statuses: dict[int, int] = {}

    def post(self, path: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.loop.run_until_complete(self._post(self.api, path, data, headers or {}))

    async def _post(self, api: Api, path: str, data: bytes, headers: dict[str, str]) -> None:
        async with asyncio.timeout(20):
            async with api.http.post(path, data=data, headers=headers) as got:
                raw = await got.read()
            self.statuses[got.status] = self.statuses.get(got.status, 0) + 1
            if got.status == 200:
                if got.content_type == "text/event-stream":
                    assert raw.endswith(b"data: [DONE]\n\n"), raw
                else:
                    assert json.loads(raw)["choices"], raw
            else:
                assert 400 <= got.status < 500, (got.status, raw)
                if "Content-Encoding" in headers and got.content_type == "text/plain":
                    return  # aiohttp's parser refused it before there was a request
                assert set(json.loads(raw)["error"]) == {"message", "type", "param", "code"}
            while api.app[STATE].running or api.engine.living:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def server() -> Iterator[Fuzzed]:
    fuzzed = Fuzzed()
    yield fuzzed
    fuzzed.loop.run_until_complete(fuzzed.stop())
    fuzzed.loop.close()
    # Both outcomes must have been reached, or the strategies test nothing.
    assert fuzzed.statuses.get(200, 0) > 20, fuzzed.statuses
    assert fuzzed.statuses.get(400, 0) > 20, fuzzed.statuses


FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(body=CHAT_BODY)
def test_chat_bodies(server: Fuzzed, body: dict[str, Any]) -> None:
    server.post("/v1/chat/completions", json.dumps(body).encode())


@FUZZ
@given(body=TEXT_BODY)
def test_text_bodies(server: Fuzzed, body: dict[str, Any]) -> None:
    server.post("/v1/completions", json.dumps(body).encode())


@settings(FUZZ, max_examples=150)
@given(
    body=CHAT_BODY,
    position=st.floats(0, 1),
    junk=st.binary(max_size=6),
    cut=st.integers(0, 8),
)
def test_damaged_bytes(
    server: Fuzzed, body: dict[str, Any], position: float, junk: bytes, cut: int
) -> None:
    data = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    at = int(position * len(data))
    server.post("/v1/chat/completions", data[:at] + junk + data[at + cut :])


@settings(FUZZ, max_examples=60)
@given(data=st.binary(max_size=200), encoding=st.sampled_from(["gzip", "deflate", "x", ""]))
def test_any_bytes_and_encodings(server: Fuzzed, data: bytes, encoding: str) -> None:
    headers = {aiohttp.hdrs.CONTENT_ENCODING: encoding} if encoding else {}
    server.post("/v1/completions", data, headers)
