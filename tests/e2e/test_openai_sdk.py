"""The openai package, written by nobody here, against a server.

The `server` fixture gives base_url; what a test asserts holds for any model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import openai
import pytest

pytestmark = pytest.mark.e2e


class ServerLike(Protocol):
    @property
    def base_url(self) -> str: ...


@pytest.fixture
def client(server: ServerLike) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=server.base_url + "/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


USER: Any = [{"role": "user", "content": "Tell me something."}]


def ask(client: openai.OpenAI, model: str, **fields: Any) -> Any:
    fields = {"max_tokens": 12, "temperature": 0, "messages": USER, "model": model} | fields
    return client.chat.completions.create(**fields)


def streamed(client: openai.OpenAI, model: str, **fields: Any) -> tuple[dict[int, str], list[Any]]:
    chunks = list(ask(client, model, stream=True, **fields))
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return texts, chunks


def test_models(client: openai.OpenAI, model: str) -> None:
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_chat(client: openai.OpenAI, model: str) -> None:
    answer = ask(client, model)
    assert answer.object == "chat.completion"
    assert answer.model == model
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.choices[0].message.role == "assistant"
    usage = answer.usage
    assert 1 <= usage.completion_tokens <= 12
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0


def test_stream_equals_answer(client: openai.OpenAI, model: str) -> None:
    answer = ask(client, model)
    texts, chunks = streamed(client, model, stream_options={"include_usage": True})
    assert texts[0] == answer.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    finished = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [r for r in finished if r] == [answer.choices[0].finish_reason]


def test_max_tokens_is_exact(client: openai.OpenAI, model: str) -> None:
    extra = {"ignore_eos": True}
    for limit in (1, 7):
        answer = ask(client, model, max_tokens=limit, extra_body=extra)
        assert answer.usage.completion_tokens == limit
        assert answer.choices[0].finish_reason == "length"
    answer = ask(client, model, max_tokens=None, max_completion_tokens=3, extra_body=extra)
    assert answer.usage.completion_tokens == 3


def test_n(client: openai.OpenAI, model: str) -> None:
    answer = ask(client, model, n=3, seed=5, temperature=1.0)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    texts, _ = streamed(client, model, n=3, seed=5, temperature=1.0)
    assert [texts[i] for i in range(3)] == [c.message.content for c in answer.choices]


def test_stop(client: openai.OpenAI, model: str) -> None:
    whole = ask(client, model, max_tokens=24, extra_body={"ignore_eos": True})
    text = whole.choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    if not stop:
        pytest.skip("the model's answer has no text")
    answer = ask(client, model, max_tokens=24, stop=[stop], extra_body={"ignore_eos": True})
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    texts, _ = streamed(client, model, max_tokens=24, stop=stop, extra_body={"ignore_eos": True})
    assert texts.get(0, "") == text[: text.index(stop)]


def test_logprobs(client: openai.OpenAI, model: str) -> None:
    fields: Any = {"logprobs": True, "top_logprobs": 3, "extra_body": {"ignore_eos": True}}
    content = ask(client, model, **fields).choices[0].logprobs.content
    assert len(content) == 12
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[2].logprob
    _, chunks = streamed(client, model, **fields)
    parts = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
    assert [e.token for p in parts for e in p.content] == [e.token for e in content]


def test_completion_with_echo_and_logprobs(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt="The sky is", echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text.startswith("The sky is")
    logprobs: Any = choice.logprobs
    assert logprobs.token_logprobs[0] is None
    assert all(p <= 0 for p in logprobs.token_logprobs[1:])
    lengths = {len(getattr(logprobs, k)) for k in ("tokens", "token_logprobs", "top_logprobs")}
    assert len(lengths) == 1
    ids = client.completions.create(model=model, prompt=[[1, 2, 3], [4, 5]], max_tokens=2)
    assert [c.index for c in ids.choices] == [0, 1]
    assert ids.usage is not None
    assert ids.usage.prompt_tokens >= 5  # a BOS may be added to text, never to ids


def test_completion_stream(client: openai.OpenAI, model: str) -> None:
    fields: Any = {"model": model, "prompt": "Once upon", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**fields).choices[0].text
    parts = [c.choices[0].text for c in client.completions.create(stream=True, **fields)]
    assert "".join(parts) == whole


def test_errors(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as err:
        ask(client, model, temperature=9)
    assert err.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as err:
        ask(client, model, response_format={"type": "json_object"})
    assert err.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as err:
        ask(client, model, max_tokens=10**8)
    assert err.value.code == "context_length_exceeded"


def test_closing_a_stream_early(client: openai.OpenAI, model: str) -> None:
    stream = ask(client, model, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    assert ask(client, model, max_tokens=2).choices
