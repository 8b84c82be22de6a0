"""How people put a question: frames, spellings, slips. Turns one phrasing into many.

The grammar is `{a|b|}`: one of the alternatives, which may be empty or contain braces again.
"""

from __future__ import annotations

import random
import re

_GROUP = re.compile(r"\{([^{}]*)\}")
_KEEP = re.compile(r"[\d_/`\-]|[^\x00-\x7f]")  # words that a typo or a dropped letter would ruin

BEFORE = (
    "hi, ", "hello, ", "hey, ", "hello! ", "please tell me, ", "quick question: ", "question: ",
    "i am new here. ", "sorry, ", "ok, ", "and ", "so ", "well, ", "one more question: ",
    "i have a question: ", "can you help? ", "a question about kt_async: ", "now ", "by the way, ",
    "for my setup: ", "i am confused. ", "i read the readme, but ", "dear helper, ", "um, ",
    "can you tell me ", "could you tell me ", "do you know ", "i would like to know ",
    "please explain ", "tell me ", "i wonder ", "i want to know ", "i do not understand ",
)  # fmt: skip
AFTER = (
    " please", ", please", " thanks", " exactly", " in kt_async", " with kt_async", " here",
    " in short", " in one sentence", " for a beginner", " again", " by the way", ", do you know",
    " with this server", " in simple words", " right now", " on my machine", ", can you help",
)  # fmt: skip
TOPIC = (
    "tell me about {t}", "what about {t}", "explain {t}", "explain {t} to me", "{t}", "what is {t}",
    "describe {t}", "can you explain {t}", "please explain {t}", "i want to know about {t}",
    "give me information on {t}", "i have a question about {t}", "information about {t}",
    "how about {t}", "i need help with {t}", "help me with {t}", "what should i know about {t}",
    "what can you tell me about {t}", "what do you know about {t}", "a few words on {t}",
    "how does {t} work", "i do not understand {t}", "could you describe {t}", "define {t}",
    "what do you mean by {t}", "i keep reading about {t}", "what exactly is {t}", "and {t}",
)  # fmt: skip
FLAG_PURPOSE = (
    "what does {f} do", "what is {f}", "what is {f} for", "explain {f}", "{f}", "tell me about {f}",
    "what does {f} mean", "what is the meaning of {f}", "what does the flag {f} do", "flag {f}",
    "what is the flag {f} for", "why would i set {f}", "when do i need {f}", "describe {f}",
    "what happens with {f}", "what happens when i set {f}", "what is {f} good for", "what about {f}",
    "can you explain {f}", "i do not understand {f}", "what does the option {f} do",
    "what effect does {f} have", "how does {f} work", "what can i do with {f}", "should i set {f}",
    "what is the purpose of {f}", "what does {f} change", "what is the option {f}",
    "what does {f} control", "is there a {f} flag", "i saw {f}, what is it",
)  # fmt: skip
FLAG_USE = (
    "how do i use {f}", "how is {f} used", "give me an example of {f}", "example for {f}",
    "show me how to use {f}", "how do i set {f}", "how do i write {f}", "how do i pass {f}",
    "what does {f} look like on the command line", "an example with {f}",
)  # fmt: skip
FLAG_DEFAULT = (
    "what is the default of {f}", "what is the default for {f}", "default of {f}", "{f} default",
    "what is the default value of {f}", "what is {f} by default", "which default does {f} have",
    "what value does {f} have by default", "what happens without {f}", "what if i do not set {f}",
    "what if i leave out {f}", "what is the standard value of {f}", "does {f} have a default",
    "how is {f} set by default", "what is used when {f} is not given", "default value for {f}",
)  # fmt: skip
FLAG_GOAL = (
    "how do i {g}", "how can i {g}", "which flag do i need to {g}", "i want to {g}", "how to {g}",
    "what flag do i use to {g}", "is there a flag to {g}", "is it possible to {g}", "can i {g}",
    "flag to {g}", "which flag lets me {g}", "which option do i need to {g}", "i need to {g}",
    "what do i have to do to {g}", "i would like to {g}", "what is the flag to {g}",
    "i'd like to {g}", "what is the option to {g}", "what must i type to {g}", "help me {g}",
    "which setting do i change to {g}", "what is the way to {g}", "can the server {g}",
)  # fmt: skip
REWORD = {
    "how do i": ("how can i", "how would i", "how could i", "how should i", "how does one",
                 "what must i do to", "what do i do to", "how may i", "in which way do i",
                 "what is the way to", "what is needed to", "how do we", "how am i supposed to"),
    "what is": ("what's", "what would be", "what exactly is", "what actually is", "what was",
                "please say what is", "let me know what is", "what might be"),
    "what does": ("what would", "what exactly does", "what will", "say what does"),
    "what happens": ("what would happen", "what will happen", "what goes on", "what is done"),
    "does it": ("will it", "would it", "is it going to", "does the server", "does kt_async",
                "does this thing", "could it", "does your server", "will kt_async"),
    "can i": ("could i", "am i able to", "may i", "is it possible to", "can we", "can one",
              "am i allowed to", "would it be possible to", "is there a way to", "might i"),
    "can it": ("could it", "is it able to", "would it", "can the server", "can kt_async"),
    "is there": ("do you have", "does it have", "is there any", "does kt_async offer"),
    "do i need": ("must i have", "should i have", "do i have to have", "would i need", "is there "
                  "any need for", "do we need", "will i need"),
    "why do i": ("why would i", "what is the reason that i", "how come i", "why should i"),
    "i want to": ("i'd like to", "i would love to", "i need to", "we want to", "i plan to"),
    "which": ("what", "which of the", "what kind of", "exactly which"),
    "show me": ("give me", "let me see", "i want to see", "please show"),
    "explain": ("clarify", "describe", "tell me about", "please explain", "give details on"),
    "start": ("launch", "run", "begin", "bring up", "fire up", "boot"),
    "the server": ("kt_async", "this server", "your server", "my server", "it", "the program"),
    "my model": ("the model", "our model", "a model of mine", "my own model"),
    "use": ("employ", "work with", "make use of", "try", "utilise"),
    "change": ("modify", "alter", "adjust", "switch", "move", "edit"),
    "set": ("choose", "configure", "define", "fix", "select", "pick", "specify"),
    "limit": ("restrict", "cap", "bound", "reduce", "control"),
    "turn off": ("disable", "switch off", "deactivate", "get rid of", "stop", "avoid"),
    "supported": ("possible", "available", "accepted", "allowed", "handled", "understood"),
    "support": ("accept", "handle", "know", "allow", "understand", "work with", "take"),
    "several": ("many", "multiple", "a few", "some", "five", "two", "lots of"),
    "users": ("people", "clients", "friends", "colleagues", "persons", "customers"),
    "requests": ("calls", "queries", "questions", "users"),
    "get": ("receive", "obtain", "see", "have", "fetch"),
    "see": ("view", "look at", "find out", "check", "find", "inspect"),
    "large": ("big", "huge", "long"),
    "broken": ("damaged", "bad", "truncated", "corrupt", "incomplete"),
    "full": ("filled", "at its limit", "exhausted", "used up"),
    "computed": ("calculated", "processed", "done", "run"),
    "work": ("function", "operate", "go", "behave"),
    "mean": ("stand for", "signify", "say", "tell me"),
    "by default": ("as a default", "if i say nothing", "unless i change it", "at the start",
                   "when i change nothing", "normally", "from the beginning", "initially"),
    "default": ("standard", "preset", "usual value", "initial value"),
}  # fmt: skip
_REWORD = re.compile(r"\b(" + "|".join(sorted(REWORD, key=len, reverse=True)) + r")\b")
_DROP = {"the", "a", "an", "do", "i", "is", "does", "can", "of", "to", "me", "my", "for", "it"}


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


def dress(question: str, rng: random.Random) -> str:
    """Put a phrasing into a frame, then make the slips that typing makes."""
    is_chinese = bool(re.search(r"[\u4e00-\u9fff]", question))
    if is_chinese:
        return _dress_chinese(question, rng)
    if rng.random() < 0.45:
        question = reword(question, rng)
    draw = rng.random()
    if draw < 0.22:
        question = rng.choice(BEFORE) + question
    elif draw < 0.36:
        question += rng.choice(AFTER)
    elif draw < 0.40:
        question = rng.choice(BEFORE) + question + rng.choice(AFTER)
    if rng.random() < 0.18:
        question = _slip(question, rng)
    if rng.random() < 0.55:
        question = question[:1].upper() + question[1:]
        question = re.sub(r"\bi\b", "I", question)
    elif rng.random() < 0.04:
        question = question.upper()
    return question + rng.choice(("?", "?", "?", "", "", ".", " ?", "??", "!"))


def _dress_chinese(question: str, rng: random.Random) -> str:
    question = rng.choice(("", "", "", "请问，", "你好，", "请告诉我，", "我想知道，", "请问")) + question
    if rng.random() < 0.2:
        question = question.replace(" ", "")
    return question + rng.choice(("？", "？", "", "?", "。", "呢？", "！"))


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
