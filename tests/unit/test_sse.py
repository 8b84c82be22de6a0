"""SSE frames byte by byte."""

from __future__ import annotations

import json

import pytest

from kt_async.api.sse import DONE, HEARTBEAT, ChatFrames, TextFrames, error_frame

HEAD = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"m\\"x",'
    b'"choices":['
)


@pytest.fixture
def chat() -> ChatFrames:
    return ChatFrames("chatcmpl-1", 7, 'm"x', 2)


def test_start(chat: ChatFrames) -> None:
    assert chat.start(1, b"") == (
        HEAD + b'{"index":1,"delta":{"role":"assistant","content":""},"logprobs":null,'
        b'"finish_reason":null}]}\n\n'
    )


def test_content(chat: ChatFrames) -> None:
    assert chat.content(0, 'a\n"\u20ac%d', None, b',"usage":null') == (
        HEAD + b'{"index":0,"delta":{"content":"a\\n\\"\xe2\x82\xac%d"},"logprobs":null,'
        b'"finish_reason":null}],"usage":null}\n\n'
    )
    frame = chat.content(0, "", {"content": []}, b"")
    assert json.loads(frame[6:])["choices"][0]["logprobs"] == {"content": []}


def test_finish_and_usage(chat: ChatFrames) -> None:
    assert chat.finish(1, "length", b',"usage":{}') == (
        HEAD + b'{"index":1,"delta":{},"logprobs":null,"finish_reason":"length"}],"usage":{}}\n\n'
    )
    assert chat.usage(b',"usage":{"a":1}') == HEAD + b'],"usage":{"a":1}}\n\n'


def test_text_frames() -> None:
    frames = TextFrames("cmpl-1", 7, "m", 1)
    head = b'data: {"id":"cmpl-1","object":"text_completion","created":7,"model":"m","choices":['
    assert frames.start(0, b"") == b""
    assert frames.content(0, "a", None, b"") == (
        head + b'{"index":0,"text":"a","logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert frames.finish(0, "stop", b"") == (
        head + b'{"index":0,"text":"","logprobs":null,"finish_reason":"stop"}]}\n\n'
    )
    assert frames.usage(b',"usage":{}') == head + b'],"usage":{}}\n\n'
    logged = frames.content(0, "a", {"tokens": ["a"]}, b"")
    assert json.loads(logged[6:])["choices"][0]["logprobs"] == {"tokens": ["a"]}


def test_one_event_per_frame(chat: ChatFrames) -> None:
    """A frame is one line and an empty line, whatever the text holds."""
    frame = chat.content(0, "\r\n\n\u2028data: x\n\n", None, b"")
    assert frame.count(b"\n") == 2
    assert b"\r" not in frame
    assert frame.endswith(b"\n\n")


def test_others() -> None:
    assert DONE == b"data: [DONE]\n\n"
    assert HEARTBEAT.startswith(b":")
    assert HEARTBEAT.endswith(b"\n\n")
    assert error_frame({"message": "m"}) == b'event: error\ndata: {"error":{"message":"m"}}\n\n'
