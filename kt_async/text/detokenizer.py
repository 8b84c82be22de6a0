"""Incremental detokenisation: token bytes in, text that is safe to send out.

Pure state machines without I/O, used by `api.choice` on the event loop. Two promises, whatever
the chunking of the input: text that could still become a stop string is never sent, and text that
did not become one is never lost. A character split over several tokens appears when it is whole.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

_new_decoder = codecs.getincrementaldecoder("utf-8")


class StopStrings:
    """Aho-Corasick automaton over characters; immutable, shared by the choices of a request.

    The state after a text is the longest suffix of it that begins some stop string, so the depth
    of the state is exactly the number of characters that must be held back.
    """

    __slots__ = ("_goto", "depth", "match", "stops")

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: at least one, none empty."""
        if not stops or not all(stops):
            raise ValueError("stop strings must not be empty")
        self.stops = tuple(stops)
        self._goto: list[dict[str, int]] = [{}]
        self.depth = [0]
        # Per state: the longest stop string that ends there, as an index, or -1.
        self.match = [-1]
        for index, stop in enumerate(self.stops):
            self._insert(stop, index)
        self._link()

    def _insert(self, stop: str, index: int) -> None:
        state = 0
        for char in stop:
            following = self._goto[state].get(char)
            if following is None:
                following = len(self._goto)
                self._goto[state][char] = following
                self._goto.append({})
                self.depth.append(self.depth[state] + 1)
                self.match.append(-1)
            state = following
        if self.match[state] < 0:
            self.match[state] = index

    def _link(self) -> None:
        """Fold the failure links into the transitions, in breadth-first order."""
        fail = [0] * len(self._goto)
        queue = list(self._goto[0].values())
        for state in queue:  # grows while it is walked
            behind = fail[state]
            if self.match[state] < 0:
                self.match[state] = self.match[behind]
            children = self._goto[state]
            queue.extend(children.values())
            for char, child in children.items():
                fail[child] = self.step(behind, char)
            # Transitions of the failure state that this state lacks; the root's stay implicit.
            if behind:
                for char, target in self._goto[behind].items():
                    children.setdefault(char, target)

    def step(self, state: int, char: str) -> int:
        """Return the state after one more character."""
        following = self._goto[state].get(char)
        if following is None:
            following = self._goto[0].get(char, 0) if state else 0
        return following


class Detokenizer:
    """Text of one sequence. Not thread-safe; a few hundred bytes.

    decoded_len: characters decoded so far, held ones included; the text offset of the next token.
    released_len: characters returned so far. stopped: the stop string that matched, or None;
    from then on the sequence is over and everything fed is ignored.
    """

    __slots__ = (
        "_decode",
        "_held",
        "_include_stop",
        "_state",
        "_stops",
        "decoded_len",
        "released_len",
        "stopped",
    )

    def __init__(self, stops: StopStrings | None = None, *, include_stop: bool = False) -> None:
        """include_stop: release the matching stop string too."""
        self._decode = _new_decoder("replace").decode
        self._stops = stops
        self._state = 0
        self._held = ""
        self._include_stop = include_stop
        self.decoded_len = 0
        self.released_len = 0
        self.stopped: str | None = None

    def feed(self, data: bytes, *, match: bool = True) -> str:
        """Take the bytes of one or more tokens, return the text that became safe to send.

        match: False while stop strings do not count yet (min_tokens); such text is released.
        """
        return self._release(self._decode(data), match)

    def finish(self) -> str:
        """Return what is left: held text, and U+FFFD for an unfinished character."""
        text = self._release(self._decode(b"", True), True)
        if self.stopped is None:
            text += self._held
            self.released_len += len(self._held)
            self._held = ""
            self._state = 0
        return text

    def _release(self, new: str, match: bool) -> str:
        if self.stopped is not None:
            return ""
        self.decoded_len += len(new)
        stops = self._stops
        if stops is None or not match:
            self.released_len += len(new)
            return new
        state = self._state
        step, matches = stops.step, stops.match
        for pos, char in enumerate(new):
            state = step(state, char)
            if matches[state] >= 0:
                return self._stop(new[: pos + 1], stops.stops[matches[state]])
        self._state = state
        text = self._held + new
        cut = len(text) - stops.depth[state]
        self._held = text[cut:]
        self.released_len += cut
        return text[:cut]

    def _stop(self, new: str, stop: str) -> str:
        text = self._held + new
        if not self._include_stop:
            text = text[: len(text) - len(stop)]
        self._held = ""
        self.stopped = stop
        self.released_len += len(text)
        return text
