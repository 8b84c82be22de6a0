"""Chat and text completions over the fake engine: answers, streams, accounting."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kt_async.api.app import ApiSettings
from tests.unit.api_fakes import EOS, IM_START
from tests.unit.conftest import Api

REPLY = "Hello world, this is it."
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


async def post(api: Api, path: str, body: dict[str, Any], status: int = 200) -> Any:
    async with api.http.post(path, json=body) as response:
        answer = await response.json()
        assert response.status == status, answer
        return answer


async def stream(api: Api, path: str, body: dict[str, Any]) -> list[Any]:
    """Return the decoded frames; checks the framing byte for byte."""
    async with api.http.post(path, json=body | {"stream": True}) as response:
        assert response.status == 200, await response.text()
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        raw = await response.read()
    assert raw.endswith(b"data: [DONE]\n\n")
    frames = raw.split(b"\n\n")
    assert frames.pop() == b""
    assert frames.pop() == b"data: [DONE]"
    assert all(f.startswith(b"data: {") and b"\n" not in f for f in frames)
    return [json.loads(f[6:]) for f in frames]


def text_of(frames: list[Any], index: int = 0) -> str:
    choices = [c for f in frames for c in f["choices"] if c["index"] == index]
    return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices)


def reasons(frames: list[Any], index: int = 0) -> list[str]:
    choices = [c for f in frames for c in f["choices"] if c["index"] == index]
    return [c["finish_reason"] for c in choices if c["finish_reason"]]


async def test_answer(api: Api) -> None:
    answer = await post(api, CHAT, {"messages": USER, "model": "DeepSeek-R1"})
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "fake"  # the served one, whatever was asked for
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": REPLY, "refusal": None}
    assert choice["finish_reason"] == "stop"
    prompt = len(api.tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"))
    generated = len(api.engine.reply)
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer["timings"]["predicted_n"] == generated
    assert api.engine.submitted[0].prompt_ids[0] == IM_START


async def test_stream_has_openais_frames(api: Api) -> None:
    frames = await stream(api, CHAT, {"messages": USER})
    assert frames[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert frames[-1]["choices"][0]["delta"] == {}
    assert reasons(frames) == ["stop"]
    assert frames[-1]["choices"][0]["finish_reason"] == "stop"
    assert text_of(frames) == REPLY
    assert {f["object"] for f in frames} == {"chat.completion.chunk"}
    assert len({(f["id"], f["created"], f["model"]) for f in frames}) == 1
    assert not any("usage" in f for f in frames)


async def test_include_usage(api: Api) -> None:
    api.engine.num_cached = 3
    frames = await stream(api, CHAT, {"messages": USER, "stream_options": {"include_usage": True}})
    assert all(f["usage"] is None for f in frames[:-1])
    assert frames[-1]["choices"] == []
    assert frames[-1]["usage"]["completion_tokens"] == len(api.engine.reply)
    assert frames[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


async def test_continuous_usage(api: Api) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    frames = await stream(api, CHAT, {"messages": USER, "stream_options": options})
    counts = [f["usage"]["completion_tokens"] for f in frames if f.get("usage")]
    assert counts == sorted(counts)
    assert len(counts) > 5


@pytest.mark.parametrize("include", [False, True])
async def test_return_speed_as_their_benchmark_reads_it(api: Api, include: bool) -> None:
    body: dict[str, Any] = {"messages": USER, "return_speed": True, "max_tokens": 5}
    if include:
        body["stream_options"] = {"include_usage": True}
    frames = await stream(api, CHAT, body)
    usage = None
    for frame in frames:  # keeps the last usage seen, stops at the finish frame
        if "usage" in frame:
            usage = frame["usage"]
        if frame["choices"] and frame["choices"][0]["finish_reason"] is not None:
            break
    assert usage is not None
    assert usage["prefill_time"] > 0
    assert usage["decode_time"] > 0
    assert usage["completion_tokens"] == 5
    answer = await post(api, CHAT, body | {"stream_options": None})
    assert answer["usage"]["prefill_time"] > 0


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
async def test_length(api: Api, limit: str) -> None:
    answer = await post(api, CHAT, {"messages": USER, limit: 3})
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stop", ["this", ["zzz", ", this"], ["is it.", "it"]])
async def test_stop_strings_streamed_or_not(api: Api, stop: Any) -> None:
    stops = [stop] if isinstance(stop, str) else stop
    # The stop string that is complete first ends the text.
    cut = min((REPLY.find(s) + len(s), REPLY.find(s)) for s in stops if s in REPLY)[1]
    answer = await post(api, CHAT, {"messages": USER, "stop": stop})
    assert answer["choices"][0]["message"]["content"] == REPLY[:cut]
    assert answer["choices"][0]["finish_reason"] == "stop"
    frames = await stream(api, CHAT, {"messages": USER, "stop": stop})
    assert text_of(frames) == REPLY[:cut]
    assert reasons(frames) == ["stop"]
    assert not api.engine.living or all(g.cancelled for g in api.engine.living)


async def test_text_held_for_a_stop_string_is_not_lost(api: Api) -> None:
    frames = await stream(api, CHAT, {"messages": USER, "stop": "it.and more"})
    assert text_of(frames) == REPLY


async def test_min_tokens_and_stop_options(api: Api) -> None:
    body = {"messages": USER, "stop": "l", "include_stop_str_in_output": True}
    answer = await post(api, CHAT, body)
    assert answer["choices"][0]["message"]["content"] == "Hel"
    answer = await post(api, CHAT, body | {"min_tokens": 2})  # "Hello" is one token
    assert answer["choices"][0]["message"]["content"] == "Hello worl"
    ids = api.tokenizer.encode(" world")
    answer = await post(api, CHAT, {"messages": USER, "stop_token_ids": ids})
    assert answer["choices"][0]["message"]["content"] == "Hello"


async def test_ignore_eos_and_special_tokens(api: Api) -> None:
    limit = len(api.engine.reply) + 1
    body = {"messages": USER, "ignore_eos": True, "max_tokens": limit}
    answer = await post(api, CHAT, body)
    assert answer["choices"][0]["message"]["content"] == REPLY + "Hello"
    assert answer["choices"][0]["finish_reason"] == "length"
    answer = await post(api, CHAT, body | {"skip_special_tokens": False})
    assert answer["choices"][0]["message"]["content"] == REPLY + "</s>Hello"


async def test_sampling_reaches_the_engine(api: Api) -> None:
    await post(
        api,
        CHAT,
        {
            "messages": USER,
            "temperature": 0,
            "top_p": 0.5,
            "top_k": 7,
            "min_p": 0.1,
            "seed": -1,
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "repeat_penalty": 1.5,
            "logit_bias": {"5": -100, "6": 2.5},
            "priority": 3,
            "cache_salt": "tenant",
            "min_tokens": 2,
            "user": "someone",
            "metadata": {"a": "b"},
            "store": False,
        },
    )
    request = api.engine.submitted[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 0.5, 7)
    assert (sampling.min_p, sampling.seed) == (0.1, 2**64 - 1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -1.0)
    assert sampling.repetition_penalty == 1.5
    assert sampling.logit_bias == {5: -100.0, 6: 2.5}
    assert (request.priority, request.min_tokens) == (3, 2)
    assert request.cache_salt not in (0, None)


async def test_top_p_zero_is_the_most_likely_token(api: Api) -> None:
    await post(api, CHAT, {"messages": USER, "top_p": 0})
    assert api.engine.submitted[0].sampling.top_k == 1


async def test_choices(api: Api) -> None:
    body = {"messages": USER, "n": 3, "seed": 11}
    answer = await post(api, CHAT, body)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 3 * len(api.engine.reply)
    seeds = [r.sampling.seed for r in api.engine.submitted]
    assert seeds[0] == 11
    assert len(set(seeds)) == 3
    frames = await stream(api, CHAT, body | {"stream_options": {"include_usage": True}})
    for index in range(3):
        assert text_of(frames, index) == REPLY
        assert reasons(frames, index) == ["stop"]
    assert frames[-1]["usage"]["completion_tokens"] == 3 * len(api.engine.reply)
    assert [r.sampling.seed for r in api.engine.submitted[3:]] == seeds


async def test_seeds_differ_without_one(api: Api) -> None:
    await post(api, TEXT, {"prompt": ["same", "same"], "n": 2})
    assert len({r.sampling.seed for r in api.engine.submitted}) == 4


async def test_chat_logprobs_are_the_same_streamed(api: Api) -> None:
    api.engine.reply = [*"a\u20acb".encode(), EOS]
    body = {"messages": USER, "logprobs": True, "top_logprobs": 2}
    answer = await post(api, CHAT, body)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [bytes(e["bytes"]) for e in content] == [b"a", b"\xe2", b"\x82", b"\xac", b"b"]
    assert content[0]["token"] == "a"
    assert content[1]["token"] == "bytes:\\xe2"
    assert [len(e["top_logprobs"]) for e in content] == [2] * 5
    frames = await stream(api, CHAT, body)
    streamed = [
        e for f in frames for c in f["choices"] if c["logprobs"] for e in c["logprobs"]["content"]
    ]
    assert streamed == content
    answer = await post(api, CHAT, {"messages": USER, "logprobs": True})
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize("streamed", [False, True])
async def test_logprobs_end_where_the_text_ends(api: Api, streamed: bool) -> None:
    body = {"messages": USER, "logprobs": True, "stop": ", this"}
    if streamed:
        frames = await stream(api, CHAT, body)
        entries = [
            e
            for f in frames
            for c in f["choices"]
            if c["logprobs"]
            for e in c["logprobs"]["content"]
        ]
    else:
        entries = (await post(api, CHAT, body))["choices"][0]["logprobs"]["content"]
    assert "".join(e["token"] for e in entries) == "Hello world"


async def test_completion(api: Api) -> None:
    answer = await post(api, TEXT, {"prompt": "Say:", "ignore_eos": True})
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == REPLY
    assert answer["usage"]["completion_tokens"] == 16  # OpenAI's default
    assert answer["choices"][0]["finish_reason"] == "length"
    frames = await stream(api, TEXT, {"prompt": "Say:", "max_tokens": 100})
    assert text_of(frames) == REPLY
    assert {f["object"] for f in frames} == {"text_completion"}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
async def test_prompt_forms(api: Api, prompt: Any, expected: list[list[int]]) -> None:
    answer = await post(api, TEXT, {"prompt": prompt, "n": 2, "best_of": 2, "max_tokens": 2})
    assert [list(r.prompt_ids) for r in api.engine.submitted[::2]] == expected
    assert [c["index"] for c in answer["choices"]] == list(range(2 * len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("streamed", [False, True])
async def test_echo_with_logprobs_as_lm_eval_asks(
    api: Api, max_tokens: int, streamed: bool
) -> None:
    ids = api.tokenizer.encode("The sky")
    body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    if streamed:
        parts = [c for f in await stream(api, TEXT, body) for c in f["choices"]]
        text = "".join(c["text"] for c in parts)
        logprobs: dict[str, list[Any]] = {}
        for part in parts:
            for key, value in (part["logprobs"] or {}).items():
                logprobs.setdefault(key, []).extend(value)
    else:
        choice = (await post(api, TEXT, body))["choices"][0]
        text, logprobs = choice["text"], choice["logprobs"]
    assert text == "The sky" + "Hello" * max_tokens
    assert logprobs["tokens"] == [*"The sky", *["Hello"] * max_tokens]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == list(range(len(ids) + max_tokens))
    for token, logprob, top in list(
        zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    )[1:]:
        assert logprob == -0.25
        assert max(top, key=top.get) == token
    assert api.engine.submitted[0].sampling.prompt_logprobs == 1


async def test_echo_of_a_single_token_prompt(api: Api) -> None:
    body = {"prompt": [97], "echo": True, "logprobs": 0, "max_tokens": 1}
    choice = (await post(api, TEXT, body))["choices"][0]
    assert choice["text"] == "aHello"
    assert choice["logprobs"]["tokens"] == ["a", "Hello"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25]


async def test_echo_without_logprobs(api: Api) -> None:
    answer = await post(api, TEXT, {"prompt": ["a ", "b "], "echo": True, "max_tokens": 1})
    assert [c["text"] for c in answer["choices"]] == ["a Hello", "b Hello"]
    answer = await post(api, TEXT, {"prompt": "a ", "echo": True, "max_tokens": 0})
    assert answer["choices"][0]["text"] == "a "
    assert answer["usage"]["completion_tokens"] == 0


async def test_messages_reach_the_template(api: Api) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    await post(
        api,
        CHAT,
        {
            "messages": [
                {"role": "developer", "content": "be brief"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                },
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "42", "tool_call_id": "c1"},
            ],
            "chat_template_kwargs": {"enable_thinking": False},
        },
    )
    system, user, assistant, tool = api.template.messages
    assert system == {"role": "system", "content": "be brief"}
    assert user["content"] == "a\nb"
    assert assistant["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert tool["tool_call_id"] == "c1"
    assert api.template.kwargs == {"enable_thinking": False}


async def test_continue_the_last_message(api: Api) -> None:
    messages = [*USER, {"role": "assistant", "content": "Well, "}]
    body = {"messages": messages, "add_generation_prompt": False, "echo": True, "max_tokens": 1}
    answer = await post(api, CHAT, body)
    assert answer["choices"][0]["message"]["content"] == "Well, Hello"


async def test_long_prompts_are_tokenised_off_the_loop(api: Api) -> None:
    answer = await post(api, TEXT, {"prompt": "Hello" * 1000, "max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == 1000


class TestForceThink:
    @pytest.fixture
    def api_settings(self) -> ApiSettings:
        return ApiSettings(model_name="fake", force_think=True)

    async def test_tag_is_in_prompt_and_answer(self, api: Api) -> None:
        frames = await stream(api, CHAT, {"messages": USER})
        assert text_of(frames) == "<think>\n" + REPLY
        ids = list(api.engine.submitted[0].prompt_ids)
        assert ids[-2:] == api.tokenizer.encode("<think>\n")


class TestServerDefaults:
    @pytest.fixture
    def api_settings(self) -> ApiSettings:
        return ApiSettings(model_name="fake", max_new_tokens=4, temperature=0.25, top_p=0.5)

    async def test_apply(self, api: Api) -> None:
        for body in ({}, {"max_tokens": 100}):
            answer = await post(api, CHAT, {"messages": USER, **body})
            assert answer["usage"]["completion_tokens"] == 4
            assert answer["choices"][0]["finish_reason"] == "length"
        sampling = api.engine.submitted[0].sampling
        assert (sampling.temperature, sampling.top_p) == (0.25, 0.5)


async def test_bos_is_there_once(api: Api) -> None:
    api.tokenizer.add_bos = True
    await post(api, TEXT, {"prompt": "a"})
    await post(api, TEXT, {"prompt": "<s>a"})
    assert [list(r.prompt_ids) for r in api.engine.submitted] == [[256, 97], [256, 97]]
