"""What the API hands to the engine and gets back: plain data, no torch, no asyncio state.

The API layer programs against `Engine` and `Generation`; `engine.service` implements them, tests
use fakes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Ranges are checked by `api.schema`, again by the native library."""

    temperature: float = 1.0  # 0 = argmax
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # 64 bits; the API draws one when the client gave none
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int = -1  # -1 none, 0 only the chosen token's, n alternatives
    prompt_logprobs: int = -1


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate (a request with n > 1 is n of these)."""

    request_id: str  # for logs; not unique among the n choices
    prompt_ids: Sequence[int]
    max_tokens: int | None  # None = what fits
    sampling: SamplingParams
    stop_ids: Sequence[int] = ()  # generation ends with these (EOS included unless ignore_eos)
    min_tokens: int = 0
    priority: int = 0
    cache_salt: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token and of its most likely rivals (most likely first)."""

    token: int
    logprob: float
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step of the engine added to one sequence.

    finish_reason: None while running; "stop", "length", "cancelled", "timeout" or "error".
    A stop id is delivered in `tokens` like any other; `stopped_by` names it.
    """

    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()  # parallel to tokens when asked for
    prompt_logprobs: Sequence[TokenLogprob | None] = ()  # pieces in prompt order; first is None
    finish_reason: str | None = None
    stopped_by: int | None = None
    num_cached: int = 0  # prompt tokens that came from the prefix cache
    queue_s: float = 0.0  # submit -> first planned; valid from the first output on
    error: str | None = None  # sentence for finish_reason "error"


class Generation(Protocol):
    """A running sequence: iterate for outputs, the last has a finish_reason."""

    def __aiter__(self) -> AsyncIterator[StepOutput]: ...

    def cancel(self) -> None:
        """Free everything at the next step; harmless when it has ended. Any thread."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Fixed facts about what is served, for /v1/models, /health and request checks."""

    model_name: str
    architecture: str
    max_model_len: int  # most tokens of prompt + output
    vocab_size: int
    created: int  # unix seconds
    details: Mapping[str, Any] = field(default_factory=dict)  # quantisation, sizes, placement


class Engine(Protocol):
    """The engine as the API sees it. [loop]"""

    info: EngineInfo

    def submit(self, request: GenerationRequest) -> Generation:
        """Queue a sequence. Raises RequestError: 400 when it can never fit, 429 when full, 503
        while draining or after an engine failure."""

    def stats(self) -> Mapping[str, float]:
        """Counters and gauges for /metrics: names as in kt_sched_stats plus engine timings."""

    @property
    def healthy(self) -> bool: ...

    @property
    def failure(self) -> str | None:
        """Why `healthy` is false."""
