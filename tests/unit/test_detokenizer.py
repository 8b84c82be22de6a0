"""Detokenizer: whatever the chunking, nothing leaks and nothing is lost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kt_async.text.detokenizer import Detokenizer, StopStrings


def run(chunks: list[bytes], stops: list[str], *, include: bool = False) -> tuple[str, str | None]:
    detok = Detokenizer(StopStrings(stops) if stops else None, include_stop=include)
    text = "".join(detok.feed(chunk) for chunk in chunks)
    text += detok.finish()
    assert detok.released_len == len(text)
    return text, detok.stopped


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Slow twin: the match that ends first wins, the longest one among those."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    points = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(points)]


ALPHABET = st.text(alphabet="ab\n\u00e9\u20ac\U0001f600", max_size=40)


@settings(max_examples=300, deadline=None)
@given(
    text=ALPHABET,
    stops=st.lists(st.text(alphabet="ab\n\u20ac", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 200), max_size=40),
)
def test_any_chunking_gives_the_same_text(text: str, stops: list[str], cuts: list[int]) -> None:
    assert run(split(text.encode(), cuts), stops) == expected(text, stops)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), cuts=st.lists(st.integers(0, 100), max_size=30))
def test_invalid_bytes_become_replacement_characters(data: bytes, cuts: list[int]) -> None:
    text, _ = run(split(data, cuts), [])
    assert text == data.decode("utf-8", "replace")
    text.encode()  # never a lone surrogate


@settings(max_examples=150, deadline=None)
@given(
    text=ALPHABET,
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=6), min_size=1, max_size=4),
)
def test_held_text_is_only_what_could_become_a_stop(text: str, stops: list[str]) -> None:
    detok = Detokenizer(StopStrings(stops))
    for char in text:
        detok.feed(char.encode())
        if detok.stopped is not None:
            return
        held = detok.decoded_len - detok.released_len
        seen = text[: detok.decoded_len]
        longest = max(
            n
            for n in range(len(seen) + 1)
            if any(s.startswith(seen[len(seen) - n :]) for s in stops)
        )
        assert held == longest


def test_split_character_is_held_until_whole() -> None:
    detok = Detokenizer()
    euro = "\u20ac".encode()
    assert detok.feed(euro[:1]) == ""
    assert detok.feed(euro[1:2]) == ""
    assert detok.decoded_len == 0
    assert detok.feed(euro[2:]) == "\u20ac"
    assert detok.decoded_len == 1


def test_unfinished_character_is_flushed() -> None:
    assert run(["\u20ac".encode()[:2]], []) == ("\ufffd", None)


def test_held_text_is_released_at_the_end() -> None:
    assert run([b"Hello\n"], ["\n\nUser:"]) == ("Hello\n", None)


def test_stop_spanning_tokens_never_leaks() -> None:
    detok = Detokenizer(StopStrings(["\n\nUser:"]))
    parts = [detok.feed(part) for part in (b"Hi.\n", b"\nUs", b"er: more")]
    assert parts == ["Hi.", "", ""]
    assert detok.stopped == "\n\nUser:"
    assert detok.feed(b"ignored") == ""
    assert detok.finish() == ""


def test_failed_partial_match_is_released_in_order() -> None:
    detok = Detokenizer(StopStrings(["aab"]))
    assert detok.feed(b"aa") == ""
    assert detok.feed(b"aa") == "aa"  # "aa" may still grow into "aab"
    assert detok.feed(b"b!") == ""
    assert detok.stopped == "aab"


def test_include_stop() -> None:
    assert run([b"one<", b"end>two"], ["<end>"], include=True) == ("one<end>", "<end>")


def test_longest_of_two_stops_with_the_same_end() -> None:
    assert run([b"xabc"], ["c", "abc"]) == ("x", "abc")
    assert run([b"xabc"], ["bc", "c", "zz"]) == ("xa", "bc")


def test_match_off_releases_and_ignores() -> None:
    detok = Detokenizer(StopStrings(["stop"]))
    assert detok.feed(b"stop st", match=False) == "stop st"
    assert detok.feed(b"op") == "op"
    assert detok.feed(b" stop") == " "
    assert detok.stopped == "stop"


@pytest.mark.parametrize("stops", [[], [""], ["a", ""]])
def test_empty_stops_are_refused(stops: list[str]) -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(stops)
