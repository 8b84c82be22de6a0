"""Sampling as the contract defines it, slowly, in numpy float64: the native sampler's twin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
_MASK = 0xFFFFFFFF


def philox(key: int, counter: int) -> list[int]:
    """One block of Philox4x32-10 (Salmon et al., SC'11): four 32-bit words."""
    c = [counter & _MASK, counter >> 32 & _MASK, 0, 0]
    k = [key & _MASK, key >> 32 & _MASK]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & _MASK, (a >> 32) ^ c[3] ^ k[1], a & _MASK]
        k = [(k[0] + 0x9E3779B9) & _MASK, (k[1] + 0xBB67AE85) & _MASK]
    return c


def uniform(seed: int, position: int) -> float:
    """The draw in [0, 1) that belongs to (seed, position)."""
    word = philox(seed, position)
    return float(((word[0] >> 5) << 26) | (word[1] >> 6)) / 2**53


def log_softmax(logits: npt.NDArray[np.floating]) -> F64:
    """In float64."""
    wide = logits.astype(np.float64)
    top = wide.max()
    result: F64 = wide - top - np.log(np.exp(wide - top).sum())
    return result


def process(
    logits: npt.NDArray[np.float32],
    params: Mapping[str, float],
    *,
    sample_vocab: int | None = None,
    history: Sequence[tuple[int, int]] = (),
    bias: Sequence[tuple[int, float]] = (),
    allowed: npt.NDArray[np.bool_] | None = None,
) -> F64:
    """Penalties, bias, mask. history: (id, times generated)."""
    out = logits.astype(np.float64)
    for token, count in history:
        penalty = params["repetition_penalty"]
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
        if count > 0:
            out[token] -= params["presence_penalty"] + params["frequency_penalty"] * count
    for token, value in bias:
        out[token] += value
    if allowed is not None:
        out[~allowed] = -np.inf
    out[sample_vocab if sample_vocab is not None else out.size :] = -np.inf
    return out


def distribution(processed: F64, params: Mapping[str, float]) -> F64:
    """Probabilities after temperature, top_k, top_p and min_p; ties keep the lower id."""
    weights = np.exp((processed - processed.max()) / params["temperature"])
    order = np.lexsort((np.arange(weights.size), -weights))
    keep = np.ones(weights.size, bool)
    if params["top_k"]:
        keep[order[int(params["top_k"]) :]] = False
    if params["top_p"] < 1:
        sums = np.cumsum(np.where(keep, weights, 0)[order])
        reached = np.searchsorted(sums, params["top_p"] * sums[-1], side="left")
        keep[order[reached + 1 :]] = False
    keep &= weights >= params["min_p"]
    weights = np.where(keep, weights, 0)
    result: F64 = weights / weights.sum()
    return result


def sample(processed: F64, params: Mapping[str, float], seed: int, position: int) -> int:
    """The id at which the cumulative probability, in id order, passes the draw."""
    if params["temperature"] == 0:
        return int(processed.argmax())
    cumulative = np.cumsum(distribution(processed, params))
    return int(np.searchsorted(cumulative, uniform(seed, position), side="right"))
