"""Sampling fields of a body to what the engine takes. Pure functions."""

from __future__ import annotations

import hashlib

from kt_async.api.bodies import Body
from kt_async.api.schema import bias_map
from kt_async.api.state import ApiState
from kt_async.engine.types import SamplingParams

_MASK64 = 2**64 - 1


def sampling_params(
    body: Body, state: ApiState, num_logprobs: int, prompt_logprobs: int
) -> SamplingParams:
    """Return how to choose tokens: the body\'s fields over the server\'s defaults."""
    settings = state.settings
    top_p = settings.top_p if body.top_p is None else body.top_p
    top_k = settings.top_k if body.top_k is None else max(body.top_k, 0)
    if top_p == 0:  # the smallest set that holds any mass is the most likely token
        top_p, top_k = 1.0, 1
    repetition = body.repetition_penalty or body.repeat_penalty or settings.repetition_penalty
    return SamplingParams(
        temperature=settings.temperature if body.temperature is None else body.temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=settings.min_p if body.min_p is None else body.min_p,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=repetition,
        logit_bias=bias_map(body.logit_bias, state.engine.info.vocab_size),
        num_logprobs=num_logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def choice_seed(seed: int, index: int) -> int:
    """Return the 64-bit seed of a choice: the given one for the first, then a hash of both.

    Source of the mixing steps: Steele et al., SplitMix, OOPSLA 2014.
    """
    seed &= _MASK64
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def salt_bits(salt: str | int | None) -> int:
    """Return the 64-bit salt of the prefix cache; 0 shares with everybody."""
    if salt is None:
        return 0
    digest = hashlib.blake2b(str(salt).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
