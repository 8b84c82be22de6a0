"""From engine outputs to text and log-probabilities, for one sequence. No I/O. [loop]"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from kt_async.api.state import TokenizerLike
from kt_async.engine.types import StepOutput, TokenLogprob
from kt_async.errors import RequestError
from kt_async.text.detokenizer import Detokenizer, StopStrings

_ITEM_BYTES = 256  # rough size of one log-probability entry on the wire


class TextRules(NamedTuple):
    """How the choices of a request turn tokens into text."""

    stops: StopStrings | None
    include_stop: bool
    min_tokens: int  # stop strings do not count before
    skip_special: bool
    logprobs: bool
    prompt_logprobs: bool = False


class LoggedToken(NamedTuple):
    """A token with its log-probability and the offset of its text; None for the first prompt token.

    end: offset in the generated text after this token; 0 for prompt tokens.
    """

    token: int
    entry: TokenLogprob | None
    offset: int
    end: int


class Choice:
    """One sequence: takes StepOutputs, collects text and log-probabilities that may be sent.

    finish_reason: None while running; then stop, length, abort or error (see `error`).
    """

    def __init__(
        self,
        index: int,
        tokenizer: TokenizerLike,
        rules: TextRules,
        prefix: str = "",
        prompt_ids: Sequence[int] = (),
    ) -> None:
        """prefix: text before the first token (echo, think tag); prompt_ids: for its logprobs."""
        self.index = index
        self.num_tokens = 0
        self.num_cached = 0
        self.queue_s = 0.0
        self.first_s: float | None = None
        self.last_s = 0.0
        self.finish_reason: str | None = None
        self.error: RequestError | None = None
        self.opened = False  # its first frame was sent
        self.closed = False  # its last frame was sent
        self.queued = False  # in Run.dirty
        self._tokenizer = tokenizer
        self._rules = rules
        self._detok = Detokenizer(rules.stops, include_stop=rules.include_stop)
        self._prefix_len = len(prefix)
        self._prefix = prefix
        self._prompt_ids = prompt_ids
        self._prompt_text = Detokenizer()
        self._num_prompt_items = 0
        self._texts: list[str] = []
        self._items: list[LoggedToken] = []
        self._unreleased: deque[LoggedToken] = deque()

    def feed(self, out: StepOutput, now: float) -> None:
        """Take what one step added. now: monotonic seconds."""
        self.num_cached = out.num_cached or self.num_cached
        self.queue_s = out.queue_s or self.queue_s
        if out.prompt_logprobs:
            self._feed_prompt(out.prompt_logprobs)
        if out.tokens:
            if self.first_s is None:
                self.first_s = now
            self.last_s = now
            self._open()
            self._feed_tokens(out)
        if out.finish_reason is not None and self.finish_reason is None:
            self._finish(out)

    def fail(self, error: RequestError) -> None:
        """End with an error."""
        self.finish_reason = "error"
        self.error = error

    def take(self) -> tuple[str, list[LoggedToken]]:
        """Return and forget what may be sent."""
        texts, items = self._texts, self._items
        if not texts and not items:
            return "", items
        self._texts, self._items = [], []
        return texts[0] if len(texts) == 1 else "".join(texts), items

    def unsent_bytes(self) -> int:
        """Return about how much take() would give."""
        return sum(map(len, self._texts)) + _ITEM_BYTES * len(self._items)

    def _open(self) -> None:
        if self._rules.prompt_logprobs and not self._num_prompt_items:
            self._feed_prompt((None,))  # a prompt of one token has no log-probability to wait for
        if self._prefix:
            self._texts.append(self._prefix)
            self._prefix = ""

    def _feed_prompt(self, entries: Sequence[TokenLogprob | None]) -> None:
        for entry in entries:
            pos = self._num_prompt_items
            token = entry.token if entry is not None else self._prompt_ids[pos]
            offset = self._prompt_text.decoded_len
            if pos or token != self._tokenizer.bos_id:
                self._prompt_text.feed(self._tokenizer.token_bytes(token))
            self._items.append(LoggedToken(token, entry, offset, 0))
            self._num_prompt_items += 1

    def _feed_tokens(self, out: StepOutput) -> None:
        rules, detok, tokenizer = self._rules, self._detok, self._tokenizer
        last = len(out.tokens) - 1
        for pos, token in enumerate(out.tokens):
            self.num_tokens += 1
            if pos == last and out.stopped_by is not None:
                break
            special = rules.skip_special and tokenizer.is_special(token)
            start = detok.decoded_len
            text = detok.feed(
                b"" if special else tokenizer.token_bytes(token),
                match=self.num_tokens >= rules.min_tokens,
            )
            if text:
                self._texts.append(text)
            if rules.logprobs and pos < len(out.logprobs):
                item = LoggedToken(
                    token, out.logprobs[pos], self._prefix_len + start, detok.decoded_len
                )
                self._unreleased.append(item)
            if detok.stopped is not None:
                self._close("stop")
                return
        self._release(detok.released_len)

    def _release(self, released_len: int) -> None:
        """Move the items whose text has been released completely."""
        waiting = self._unreleased
        while waiting and waiting[0].end <= released_len:
            self._items.append(waiting.popleft())

    def _finish(self, out: StepOutput) -> None:
        reason = out.finish_reason
        if reason == "error":
            sentence = out.error or "the engine could not finish the request"
            self.fail(RequestError(500, sentence, code="engine_error"))
        elif reason == "timeout":
            sentence = out.error or "the request waited too long in the queue"
            self.fail(RequestError(503, sentence, code="queue_timeout", retry_after=10))
        else:
            self._open()
            if text := self._detok.finish():
                self._texts.append(text)
            self._close("abort" if reason == "cancelled" else str(reason))

    def _close(self, reason: str) -> None:
        """End regularly. Of the items left, those stay that begin in the text that was sent."""
        sent = self._prefix_len + self._detok.released_len
        self._items += [item for item in self._unreleased if item.offset < sent]
        self._unreleased.clear()
        self.finish_reason = reason
