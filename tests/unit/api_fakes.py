"""A fake engine, tokenizer and template: the API's contracts without a model.

The engine steps like the real one: one task decides a step for all sequences, hands every
sequence what the step added, then gives way to the loop.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from kt_async.engine.types import (
    EngineInfo,
    GenerationRequest,
    StepOutput,
    TokenLogprob,
)
from kt_async.errors import RequestError

BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
SPECIAL = {BOS: "<s>", EOS: "</s>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}
WORDS = ("Hello", " world", "\n\n", "User:", "<think>")
VOCAB = 260 + len(WORDS)


class FakeTokenizer:
    """Bytes, four control tokens and a few words."""

    eos_ids = frozenset({EOS, IM_END})
    bos_id: int | None = BOS

    def __init__(self, *, add_bos: bool = False) -> None:
        self.add_bos = add_bos
        self.vocab_size = VOCAB
        self._bytes = [bytes([i]) for i in range(256)]
        self._bytes += [text.encode() for text in (*SPECIAL.values(), *WORDS)]
        self._split = re.compile("|".join(map(re.escape, (*SPECIAL.values(), *WORDS))))
        self._ids = {data: i for i, data in enumerate(self._bytes)}

    def encode(self, text: str, *, add_bos: bool = False, parse_special: bool = True) -> list[int]:
        del parse_special
        ids = [BOS] if add_bos else []
        end = 0
        for found in self._split.finditer(text):
            ids += text[end : found.start()].encode()
            ids.append(self._ids[found[0].encode()])
            end = found.end()
        return ids + list(text[end:].encode())

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def is_special(self, token: int) -> bool:
        return token in SPECIAL


class FakeTemplate:
    """ChatML; keeps what it was called with."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.kwargs: dict[str, Any] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        self.messages, self.kwargs = [dict(m) for m in messages], kwargs
        if any(m["content"] == "template-error" for m in messages):
            raise RequestError(400, "messages: the chat template refuses them", param="messages")
        text = "".join(
            f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in self.messages
        )
        return text + "<|im_start|>assistant\n" * add_generation_prompt


class FakeGeneration:
    """One sequence of the fake engine."""

    def __init__(self, engine: FakeEngine, request: GenerationRequest, reply: list[int]) -> None:
        self.engine = engine
        self.request = request
        self.reply = reply
        self.position = 0
        self.ended = False
        self.cancelled = False
        self.first = True
        self._queue: deque[StepOutput] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[StepOutput]:
        return self

    async def __anext__(self) -> StepOutput:
        while not self._queue:
            if self.ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._queue.popleft()

    def cancel(self) -> None:
        if not self.ended:
            self.cancelled = True

    def put(self, out: StepOutput) -> None:
        self._queue.append(out)
        self.ended = self.ended or out.finish_reason is not None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def step(self) -> None:
        request, engine = self.request, self.engine
        if self.cancelled:
            engine.cancelled.append(request.request_id)
            return self.put(StepOutput(finish_reason="cancelled"))
        common = {"num_cached": engine.num_cached, "queue_s": 0.001} if self.first else {}
        if engine.fail_first or (
            engine.fail_after is not None and self.position >= engine.fail_after
        ):
            reason, sentence = engine.failure_output
            return self.put(StepOutput(finish_reason=reason, error=sentence))
        if self.first and request.sampling.prompt_logprobs >= 0 and len(request.prompt_ids) > 1:
            common["prompt_logprobs"] = [
                None,
                *(
                    self._logprob(t, request.sampling.prompt_logprobs)
                    for t in request.prompt_ids[1:]
                ),
            ]
        self.first = False
        limit = request.max_tokens
        if limit == 0:
            return self.put(StepOutput(finish_reason="length", **common))
        token = self.reply[self.position % len(self.reply)]
        self.position += 1
        finish = stopped_by = None
        if token in request.stop_ids and self.position > request.min_tokens:
            finish, stopped_by = "stop", token
        elif limit is not None and self.position >= limit:
            finish = "length"
        logprobs = ()
        if request.sampling.num_logprobs >= 0:
            logprobs = (self._logprob(token, request.sampling.num_logprobs),)
        return self.put(
            StepOutput((token,), logprobs, (), finish, stopped_by, **common)
            if "prompt_logprobs" not in common
            else StepOutput(
                tokens=(token,),
                logprobs=logprobs,
                finish_reason=finish,
                stopped_by=stopped_by,
                **common,
            )
        )

    @staticmethod
    def _logprob(token: int, top: int) -> TokenLogprob:
        return TokenLogprob(
            token,
            -0.25,
            tuple(((token + k) % 256 if k else token, -0.25 * (k + 1)) for k in range(top)),
        )


class FakeEngine:
    """Answers every prompt with `reply`, one token a step."""

    def __init__(self, tokenizer: FakeTokenizer, *, max_model_len: int = 4096) -> None:
        self.info = EngineInfo(
            model_name="fake.gguf",
            architecture="qwen3moe",
            max_model_len=max_model_len,
            vocab_size=VOCAB,
            created=1_700_000_000,
            details={"quantization": "none"},
        )
        self.tokenizer = tokenizer
        self.reply = [*tokenizer.encode("Hello world, this is it."), EOS]
        self.num_cached = 0
        self.step_s = 0.0
        self.max_running = 512
        self.paused = False
        self.fail_first = False
        self.fail_after: int | None = None
        self.failure_output = ("error", "the step failed")
        self.failure: str | None = None
        self.submitted: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self.living: list[FakeGeneration] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def healthy(self) -> bool:
        return self.failure is None

    def submit(self, request: GenerationRequest) -> FakeGeneration:
        if len(self.living) >= self.max_running:
            raise RequestError(
                429, f"the queue is full: {self.max_running}", code="queue_full", retry_after=3
            )
        assert request.prompt_ids
        assert all(0 <= t < VOCAB for t in request.prompt_ids)
        assert request.max_tokens is not None
        assert len(request.prompt_ids) + request.max_tokens <= self.info.max_model_len
        assert 0 <= request.sampling.seed < 2**64
        generation = FakeGeneration(self, request, self.reply)
        self.submitted.append(request)
        self.living.append(generation)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        return generation

    def stats(self) -> Mapping[str, float]:
        return {
            "num_running": len(self.living),
            "num_waiting": 0,
            "pages_total": 100,
            "pages_used": len(self.living),
            "steps": 7,
            "runner_run_ns": 2_500_000_000,
            "runner_kv_bytes": 1024,
            "prefix_hit_tokens": 5,
        }

    async def _run(self) -> None:
        while self.living:
            if not self.paused:
                for generation in self.living:
                    generation.step()
            else:
                for generation in self.living:
                    if generation.cancelled:
                        generation.step()
            self.living = [g for g in self.living if not g.ended]
            await asyncio.sleep(0.005 if self.paused else self.step_s)
