"""How people put a question: frames, spellings, slips. Turns one phrasing into many.

The grammar is `{a|b|}`: one of the alternatives, which may be empty or contain braces again.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import yaml

_GROUP = re.compile(r"\{([^{}]*)\}")
_KEEP = re.compile(r"[\d_/`\-]|[^\x00-\x7f]")  # words that a typo or a dropped letter would ruin

_WORDING = yaml.safe_load((Path(__file__).parent / "wording.yaml").read_text(encoding="utf-8"))
BEFORE: list[str] = _WORDING["before"]
AFTER: list[str] = _WORDING["after"]
TOPIC: list[str] = _WORDING["topic"]
FLAG_PURPOSE: list[str] = _WORDING["flag_purpose"]
FLAG_USE: list[str] = _WORDING["flag_use"]
FLAG_DEFAULT: list[str] = _WORDING["flag_default"]
FLAG_GOAL: list[str] = _WORDING["flag_goal"]
# What `soup` puts between the telling words, and the words that are not telling.
FILLER_START: list[str] = _WORDING["filler_start"]
FILLER_MIDDLE: list[str] = _WORDING["filler_middle"]
FILLER_END: list[str] = _WORDING["filler_end"]
FILLER_WORDS = frozenset(_WORDING["filler_words"])
SOUP = 0.25  # share of questions that keep only their telling words
# How names and abbreviations are really written; people use both forms.
CASED = {word.lower(): word for word in _WORDING["cased"]}
# Everyday words that say nothing about the question; they teach the model to ignore the unknown.
ORDINARY: list[str] = _WORDING["ordinary"]
REWORD: dict[str, list[str]] = _WORDING["reword"]
CHINESE: dict[str, list[str]] = _WORDING["chinese"]
CHINESE_BEFORE: list[str] = _WORDING["chinese_before"]
_DROP = frozenset(_WORDING["drop"])
_REWORD = re.compile(r"\b(" + "|".join(sorted(REWORD, key=len, reverse=True)) + r")\b")


def expand(text: str, rng: random.Random) -> str:
    """Resolve every `{a|b}` of a phrasing at random, innermost first."""
    while match := _GROUP.search(text):
        choice = rng.choice(match.group(1).split("|"))
        text = text[: match.start()] + choice + text[match.end() :]
    return re.sub(r"\s+", " ", text).strip()


def normalise(text: str) -> str:
    """Lower case without punctuation: how questions are compared with the held-out ones."""
    text = re.sub(r"[`'\"?!.,;:]", "", text.lower()).replace("-", "_")
    return re.sub(r"\s+", " ", text).strip()


def flag_spelling(name: str, rng: random.Random) -> str:
    """A flag as people write it."""
    dashed = "--" + name.replace("_", "-")
    spaced = name.replace("_", " ") if "_" in name else "--" + name
    return rng.choice((f"--{name}", f"--{name}", f"`--{name}`", name, f"`{name}`", dashed, spaced))


def reword(question: str, rng: random.Random) -> str:
    """Replace common words by near synonyms; flags and code in back-quotes stay."""

    def swap(match: re.Match[str]) -> str:
        around = question[max(0, match.start() - 1)] + question[match.end() : match.end() + 1]
        if any(mark in around for mark in "`-_/.") or rng.random() < 0.4:
            return match.group(0)
        return rng.choice(REWORD[match.group(0)])

    return _REWORD.sub(swap, question)


def soup(question: str, rng: random.Random) -> str:
    """Keep the telling words of a question and put them into new filler, so that a model learns
    to listen to the words rather than to the frame."""
    words = [word for word in question.split(" ") if word.lower().strip(",:") not in FILLER_WORDS]
    if len(words) < 2:
        return question
    groups = [[words[0]]]
    for word in words[1:]:
        if rng.random() < 0.6:
            groups[-1].append(word)
        else:
            groups.append([word])
    if rng.random() < 0.35:
        rng.shuffle(groups)
    out = [rng.choice(FILLER_START)] if rng.random() < 0.85 else []
    for number, group in enumerate(groups):
        if number and rng.random() < 0.8:
            out.append(rng.choice(FILLER_MIDDLE))
        if rng.random() < 0.12:
            out.append(rng.choice(ORDINARY))
        out += group
    if rng.random() < 0.4:
        out.append(rng.choice(FILLER_END))
    return " ".join(out)


def dress(question: str, rng: random.Random, plain: bool = False) -> str:
    """Put a phrasing into a frame, then make the slips that typing makes.

    plain: small words carry the meaning here ("before", "from"), so they are left alone.
    """
    is_chinese = bool(re.search(r"[\u4e00-\u9fff]", question))
    if is_chinese:
        return _dress_chinese(question, rng)
    if not plain and rng.random() < 0.45:
        question = reword(question, rng)
    draw = rng.random()
    if not plain and rng.random() < SOUP:
        question = soup(question, rng)
    elif draw < 0.22:
        question = rng.choice(BEFORE) + question
    elif draw < 0.36:
        question += rng.choice(AFTER)
    elif draw < 0.40:
        question = rng.choice(BEFORE) + question + rng.choice(AFTER)
    if not plain and rng.random() < 0.12:
        words = question.split(" ")
        words.insert(rng.randrange(len(words) + 1), rng.choice(ORDINARY))
        question = " ".join(words)
    if rng.random() < 0.15:
        question = _slip(question, rng)
    if rng.random() < 0.7:
        question = _with_capitals(question)
    if rng.random() < 0.55:
        question = question[:1].upper() + question[1:]
        question = re.sub(r"\bi\b", "I", question)
    elif rng.random() < 0.04:
        question = question.upper()
    return question + rng.choice(("?", "?", "?", "", "", ".", " ?", "??", "!"))


def _dress_chinese(question: str, rng: random.Random) -> str:
    for word, others in CHINESE.items():
        if word in question and rng.random() < 0.5:
            question = question.replace(word, rng.choice(others), 1)
    if rng.random() < 0.5:
        question = rng.choice(CHINESE_BEFORE) + question
    if rng.random() < 0.15 and len(question) > 6:
        at = rng.randrange(len(question))
        if ord(question[at]) > 0x3000:
            question = question[:at] + question[at + 1 :]
    if rng.random() < 0.2:
        question = question.replace(" ", "")
    return question + rng.choice(("？", "？", "", "?", "。", "呢？", "！"))


def _with_capitals(question: str) -> str:
    """Names and abbreviations as they are really written; code in back-quotes stays."""
    parts = re.split(r"([^A-Za-z0-9_+/`.-]+)", question)
    return "".join(CASED.get(part.rstrip("."), part) if part else part for part in parts)


def _slip(question: str, rng: random.Random) -> str:
    words = question.split(" ")
    spots = [n for n, word in enumerate(words) if word.lower() in _DROP]
    if spots and rng.random() < 0.5:
        del words[rng.choice(spots)]
        return " ".join(words)
    spots = [n for n, word in enumerate(words) if len(word) > 4 and not _KEEP.search(word)]
    if not spots:
        return question
    n = rng.choice(spots)
    word, at = words[n], rng.randrange(1, len(words[n]) - 2)
    words[n] = rng.choice((
        word[:at] + word[at + 1 :],
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        word[:at] + word[at] + word[at:],
    ))  # fmt: skip
    return " ".join(words)
