"""The shipped demo model answers: held-out questions, every flag, numbers, stories, Chinese."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.demo_model import measure, numbers_days
from kt_async.config import options
from tests.e2e.conftest import Server

pytestmark = pytest.mark.e2e
Message = dict[str, str]


def chat(server: Server, messages: list[Message], **fields: Any) -> str:
    """The greedy answer to a conversation."""
    body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 250, **fields}
    status, answer, _ = server.post("/v1/chat/completions", body)
    assert status == 200, answer
    assert answer["choices"][0]["finish_reason"] == "stop", answer
    return str(answer["choices"][0]["message"]["content"])


def ask_all(server: Server, questions: list[str]) -> list[str]:
    """The answers to many single questions, eight at a time."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda q: chat(server, [{"role": "user", "content": q}]), questions))


@pytest.mark.timeout(180)
def test_held_out_questions_get_the_right_fact(server: Server) -> None:
    items = [item for item in measure.load_questions() if item["set"] == "test"]
    assert len(items) == 100
    answers = ask_all(server, [item["ask"] for item in items])
    wrong = [
        (item["ask"], answer)
        for item, answer in zip(items, answers, strict=True)
        if not measure.is_right(answer, item["key"])
    ]
    assert len(wrong) <= 5, wrong
    names = [name for name, _, _ in options()]
    assert [bad for answer in answers for bad in measure.wrong_flags(answer, names)] == []


@pytest.mark.timeout(180)
def test_every_flag_is_explained_with_its_own_name_and_default(server: Server) -> None:
    flags = yaml.safe_load((measure.HERE / "flags.yaml").read_text(encoding="utf-8"))
    does = ask_all(server, [f"What does --{item['flag']} do?" for item in flags])
    default = ask_all(server, [f"What is the default of --{item['flag']}?" for item in flags])
    wrong = [
        (item["flag"], answers)
        for item, *answers in zip(flags, does, default, strict=True)
        if not measure.is_right(answers[0], ["--" + item["flag"], *item["key"]])
        or not answers[1].startswith(item["default"])
    ]
    assert wrong == []


def test_the_answer_in_the_readme_is_the_real_one(server: Server) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    body = re.search(r"curl \S+/v1/chat/completions.*?-d '(\{.*?\})'\n", readme, re.DOTALL)
    assert body is not None
    question = json.loads(body[1])["messages"][0]["content"]
    quoted = re.search(r"\n((?:> .*\n)+)", readme[body.end() :])
    assert quoted is not None
    shown = " ".join(line.removeprefix("> ") for line in quoted[1].splitlines())
    assert ask_all(server, [question]) == [shown]


def test_sums_and_counting(server: Server) -> None:
    pairs = [(a, b) for a in range(0, 21, 3) for b in range(0, 21 - a, 4)]
    sums = ask_all(server, [f"What is {a} + {b}?" for a, b in pairs])
    assert sums == [f"{a} + {b} = {a + b}." for a, b in pairs]
    counted, beyond = ask_all(server, ["Count from 4 to 11.", "What is 345 * 12?"])
    assert counted == "4, 5, 6, 7, 8, 9, 10, 11."
    assert beyond == numbers_days.LIMIT


def test_days_and_months(server: Server) -> None:
    days = numbers_days.DAYS
    answers = ask_all(server, [f"Which day comes after {day}?" for day in days])
    assert answers == [f"{days[(n + 1) % 7]} comes after {day}." for n, day in enumerate(days)]
    (months,) = ask_all(server, ["List the months."])
    assert months == ", ".join(numbers_days.MONTHS) + "."


def test_small_talk_and_what_it_cannot_know(server: Server) -> None:
    hello, thanks, capital, news = ask_all(
        server, ["Hello!", "Thank you!", "What is the capital of France?", "Who was Napoleon?"]
    )
    assert "Hello" in hello or "Hi!" in hello
    assert "welcome" in thanks
    assert "tiny demo model" in capital and "tiny demo model" in news


def test_chinese(server: Server) -> None:
    start, port = ask_all(server, ["怎么启动服务器", "默认端口是多少"])
    assert "make serve" in start and "在仓库里" in start
    assert "10002" in port


def test_a_story_keeps_its_characters_over_several_turns(server: Server) -> None:
    messages = [{"role": "user", "content": "Tell me a story about a fox named Ruby."}]
    story = chat(server, messages)
    assert "fox named Ruby" in story and 200 < len(story) < 900
    friend = re.search(r"met an? (\w+) named (\w+)", story)
    assert friend is not None, story
    messages += [
        {"role": "assistant", "content": story},
        {"role": "user", "content": "Who helped Ruby?"},
    ]
    assert chat(server, messages) == f"{friend[2]} the {friend[1]} helped Ruby."


def test_system_prompts_are_followed(server: Server) -> None:
    question = {"role": "user", "content": "What does a 429 mean?"}
    brief = chat(server, [{"role": "system", "content": "Answer in one sentence."}, question])
    assert brief.count(".") == 1 and "queue" in brief
    named = [
        {"role": "system", "content": "You are Robin."},
        {"role": "user", "content": "What is your name?"},
    ]
    assert chat(server, named) == "My name is Robin."
