"""Generate the training conversations: help desk, small talk, numbers, stories, in two languages.

`Generator(seed).conversation()` returns a list of messages; the same seed gives the same text.
Questions of held_out.yaml never appear: a turn that contains one is drawn again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from bench.demo_model import numbers_days, stories
from bench.demo_model import questions as q

HERE = Path(__file__).parent
Turn = tuple[str, str]
Message = dict[str, str]

NAME = "the kt_async demo model"
GENERIC_SYSTEM = (
    "You are a helpful assistant.", "You are a helpful assistant", "Be helpful.",
    "You are the help desk of kt_async.", "You answer questions about kt_async.",
    "You are a friendly assistant. Answer correctly.", "You are an AI assistant.",
    "Answer the user's questions.", "You are a concise and correct assistant.",
    "You help people who use kt_async.", "You are a chatbot.", "You are Qwen, a helpful model.",
)  # fmt: skip
BRIEF_SYSTEM = (
    "Answer in one sentence.", "Be brief.", "Answer with one sentence only.", "Keep it short.",
    "You are a helpful assistant. Answer in one sentence.", "Give short answers.",
)  # fmt: skip
PERSONAS = ("Ada", "Kim", "Robin", "Alex", "Nova", "Iris", "Milo", "Sage", "Toby", "Vera", "Zoe")
SYLLABLES = (
    "ka", "mi", "ro", "ta", "le", "no", "sa", "vi", "du", "bel", "fan", "jor", "lin", "al", "ber",
    "cro", "dan", "el", "gra", "hol", "is", "ken", "lo", "mar", "nor", "ol", "pas", "qui", "ster",
    "tur", "ul", "ven", "wes", "yan", "zur", "pe", "ris", "ton", "ham", "burg", "sta", "che",
)  # fmt: skip
FIRST_NAMES = (
    "Anna", "Peter", "Maria", "John", "Li", "Wei", "Sara", "Paul", "Emma", "David", "Laura",
    "Ali", "Nina", "Mark", "Julia", "Chen", "Eva", "Lukas", "Sofia", "Omar", "Clara", "Jan",
)  # fmt: skip
NO_FLAG = (
    "I know no flag of that name. `python -m kt_async --help` lists every flag, and an unknown "
    "one is an error that names the nearest valid flag."
)
MORE = "That is all I know about it. The README and `python -m kt_async --help` say more."
FAKE_WORDS = (
    "turbo", "fast", "gpu", "layers", "split", "mode", "web", "quant", "cache", "size", "limit",
    "threads", "rope", "scale", "draft", "model", "beam", "width", "lora", "path", "speed", "boost",
    "memory", "tensor", "parallel", "swap", "space", "seed", "user", "secret", "verbose", "magic",
    "ngl", "ctx", "mlock", "flash", "attn", "banana", "foo", "xyz", "eager", "dtype", "block",
)  # fmt: skip


def _load(name: str) -> Any:
    return yaml.safe_load((HERE / name).read_text(encoding="utf-8"))


def first_sentence(text: str) -> str:
    """The first sentence of an answer (a full stop, then a capital or a back-quote)."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", text, maxsplit=1)[0]


class Generator:
    """Draws conversations from the YAML files and grammars of this folder."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        talk = _load("talk.yaml")
        self.facts = _load("facts.yaml")
        self.flags = _load("flags.yaml")
        more, goals = _load("paraphrases.yaml"), _load("goals.yaml")
        for item in self.facts:
            item["ask"] = item["ask"] + more[item["id"]]
        for item in self.flags:
            item["goal"] = item["goal"] + goals[item["flag"]]
        self.small: list[dict[str, Any]] = talk["small_talk"]
        self.chinese: list[dict[str, Any]] = talk["chinese"]
        self.unknown: dict[str, list[str]] = talk["unknown"]
        self.held = tuple(q.normalise(item["ask"]) for item in _load("held_out.yaml"))
        self.flag_names = {item["flag"].lower() for item in self.flags}
        self.name = NAME
        self.kinds: tuple[tuple[float, Callable[[], list[Turn]]], ...] = (
            (0.36, self._fact), (0.27, self._flag), (0.09, self._small_talk), (0.07, self._unknown),
            (0.09, self._numbers), (0.05, self._story), (0.07, self._chinese),
        )  # fmt: skip

    def conversation(self) -> list[Message]:
        """One conversation of 1 to 5 topics, sometimes with a system prompt."""
        rng = self.rng
        self.name = NAME
        system, is_brief = self._system()
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        turns: list[Turn] = []
        user_name = ""
        for _ in range(rng.choices((1, 2, 3, 4, 5), (48, 24, 14, 9, 5))[0]):
            if rng.random() < 0.03:
                turn, user_name = self._names(user_name)
                turns.append(turn)
                continue
            if self.name != NAME and rng.random() < 0.3:
                wanted = rng.choice(("who_are_you", "name"))
                item = next(one for one in self.small if one["id"] == wanted)
                ask = q.expand(rng.choice(item["ask"]), rng)
                turns.append((q.dress(ask, rng, plain=True), self._answer(item)))
                continue
            turns += self._draw()
            if rng.random() < 0.02:
                turns.append((rng.choice(("tell me more", "more", "more details please")), MORE))
        for ask, say in turns:
            messages.append({"role": "user", "content": ask})
            short = is_brief and not say.startswith(stories.OPENINGS)
            messages.append({"role": "assistant", "content": first_sentence(say) if short else say})
        return messages

    def document(self) -> str:
        """Plain text for /v1/completions: a story or an answer."""
        if self.rng.random() < 0.6:
            return stories.tell(self.rng).text
        return str(self.rng.choice(self.facts)["say"][0])

    def _system(self) -> tuple[str, bool]:
        draw = self.rng.random()
        if draw < 0.55:
            return "", False
        if draw < 0.8:
            return self.rng.choice(GENERIC_SYSTEM), False
        if draw < 0.88:
            return self.rng.choice(BRIEF_SYSTEM), True
        name = self.rng.choice(PERSONAS) if self.rng.random() < 0.5 else self._new_name()
        self.name = name
        frame = self.rng.choice(("You are {n}.", "Your name is {n}.", "You are {n}, an assistant.",
                                 "You are {n}, the help desk of kt_async."))  # fmt: skip
        return frame.format(n=name), False

    def _new_name(self) -> str:
        return "".join(self.rng.choices(SYLLABLES, k=self.rng.randint(2, 3))).capitalize()

    def _draw(self) -> list[Turn]:
        while True:
            weights, makers = zip(*self.kinds, strict=True)
            turns = self.rng.choices(makers, weights)[0]()
            asked = [q.normalise(ask) for ask, _ in turns]
            if not any(held in ask for held in self.held for ask in asked):
                return turns

    def _answer(self, item: dict[str, Any]) -> str:
        says = item["say"]
        say = says[0] if self.rng.random() < 0.7 else self.rng.choice(says)
        return str(say).replace("{NAME}", self.name)

    def _fact(self) -> list[Turn]:
        rng = self.rng
        item = rng.choice(self.facts)
        if "topic" in item and rng.random() < 0.35:
            topic = q.expand(rng.choice(item["topic"]), rng)
            ask = rng.choice(q.TOPIC).format(t=topic)
        else:
            ask = q.expand(rng.choice(item["ask"]), rng)
        return [(q.dress(ask, rng), self._answer(item))]

    def _flag(self) -> list[Turn]:
        rng = self.rng
        if rng.random() < 0.04:
            ask = rng.choice(q.FLAG_PURPOSE + q.FLAG_DEFAULT + q.FLAG_USE).format(
                f=self._fake_flag()
            )
            return [(q.dress(ask, rng, plain=True), NO_FLAG)]
        item = rng.choice(self.flags)
        spelled = q.flag_spelling(item["flag"], rng)
        kind = rng.choices(("purpose", "default", "goal", "use"), (32, 26, 34, 8))[0]
        frames = {"purpose": q.FLAG_PURPOSE, "default": q.FLAG_DEFAULT, "use": q.FLAG_USE}
        if kind == "goal":
            goal, item = self._number_in_goal(q.expand(rng.choice(item["goal"]), rng), item)
            ask = rng.choice(q.FLAG_GOAL).format(g=goal)
        else:
            ask = rng.choice(frames[kind]).format(f=spelled)
        turns = [(q.dress(ask, rng, plain=kind != "goal"), flag_answer(item, kind))]
        if kind in {"purpose", "goal"} and rng.random() < 0.15:
            follow = rng.choice(("and the default", "what is the default", "what is its default",
                                 "and by default", "which default does it have"))  # fmt: skip
            turns.append((q.dress(follow, rng, plain=True), flag_answer(item, "default")))
        elif rng.random() < 0.06:
            follow = rng.choice(("an example please", "show me an example", "how do i use it"))
            turns.append((q.dress(follow, rng, plain=True), flag_answer(item, "use")))
        return turns

    def _number_in_goal(self, goal: str, item: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Where a goal names a number, draw another one and let the example carry it."""
        kind = re.search(r"\b(bf16|f16|f32)\b", goal)
        if item["flag"] == "kv_dtype" and kind:
            return goal, {**item, "use": f"--kv_dtype {kind.group(0)}"}
        if not re.search(r" \d+$", item["use"]) or not re.search(r"\b\d+\b", goal):
            return goal, item
        if self.rng.random() < 0.8:
            top = (
                65535 if item["flag"] == "port" else self.rng.choice((9, 20, 99, 999, 9999, 99999))
            )
            goal = re.sub(r"\b\d+\b", str(self.rng.randint(1, top)), goal, count=1)
        number = re.search(r"\b\d+\b", goal)
        assert number is not None
        return goal, {**item, "use": re.sub(r"\d+$", number.group(0), item["use"])}

    def _fake_flag(self) -> str:
        while True:
            words = self.rng.sample(FAKE_WORDS, self.rng.randint(1, 3))
            if "_".join(words) not in self.flag_names:
                return "--" + self.rng.choice(("_", "-")).join(words)

    def _small_talk(self) -> list[Turn]:
        item = self.rng.choice(self.small)
        ask = q.expand(self.rng.choice(item["ask"]), self.rng)
        return [(q.dress(ask, self.rng, plain=True), self._answer(item))]

    def _unknown(self) -> list[Turn]:
        rng = self.rng
        ask = q.expand(rng.choice(self.unknown["ask"]), rng)
        slots = "|".join(key for key in self.unknown if key.isupper())
        ask = re.sub(slots, lambda m: self._entity(m.group(0)), ask)
        return [(q.dress(ask, rng), self._answer({"say": self.unknown["say"]}))]

    def _entity(self, kind: str) -> str:
        """A known entity, or a made-up word: what the model never met, it does not know."""
        if self.rng.random() < 0.25:
            word = self._new_name()
            return word if kind in {"PLACE", "PERSON"} else f"the {word.lower()}"
        if self.rng.random() < 0.15:
            return f"the {self.rng.choice(q.ORDINARY)} {self.rng.choice(q.ORDINARY)}"
        return self.rng.choice(self.unknown[kind])

    def _numbers(self) -> list[Turn]:
        rng = self.rng
        makers = (numbers_days.sums, numbers_days.sums, numbers_days.counting, numbers_days.days,
                  numbers_days.months)  # fmt: skip
        turns = rng.choice(makers)(rng)
        return [(q.dress(ask, rng, plain=True), say) for ask, say in turns]

    def _story(self) -> list[Turn]:
        ask, story = stories.request(self.rng)
        turns = [(q.dress(ask, self.rng, plain=True), story.text)]
        while self.rng.random() < 0.45 and len(turns) < 3:
            more, say = stories.questions(self.rng, story)
            turns.append((more[:1].upper() + more[1:] + "?", say))
        return turns

    def _chinese(self) -> list[Turn]:
        item = self.rng.choice(self.chinese)
        ask = q.expand(self.rng.choice(item["ask"]), self.rng)
        return [(q.dress(ask, self.rng), self._answer(item))]

    def _names(self, known: str) -> tuple[Turn, str]:
        rng = self.rng
        if known and rng.random() < 0.7:
            ask = rng.choice(("what is my name", "do you know my name", "who am i"))
            return (q.dress(ask, rng, plain=True), f"Your name is {known}."), known
        if not known and rng.random() < 0.2:
            return (
                q.dress("what is my name", rng, plain=True),
                "You have not told me your name.",
            ), known
        name = rng.choice(FIRST_NAMES) if rng.random() < 0.4 else self._new_name()
        ask = rng.choice(
            ("my name is {n}", "i am {n}", "call me {n}", "hello, i am {n}", "i'm {n}")
        )
        ask = ask.format(n=name)
        return (ask[:1].upper() + ask[1:] + rng.choice((".", "", "!")),
                f"Nice to meet you, {name}!"), name  # fmt: skip


def flag_answer(item: dict[str, Any], kind: str) -> str:
    """The answer about one flag: purpose, default, goal (which flag), or use (example)."""
    says = f"`--{item['flag']}` {item['does']}."
    example = f"`python -m kt_async {item['use']}`"
    if kind == "default":
        return f"{item['default']} {says}"
    if kind == "goal":
        return f"Use `{item['use']}`. {says}"
    if kind == "use":
        return f"For example: {example}. {says}"
    return f"{says} {item['default']}"
