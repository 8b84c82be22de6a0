"""Which routed experts of a prompt chunk the GPU computes from a copy, and which the CPU computes.

A cost model over measured rates (engine/cuda/calibrate.py): pure arithmetic, no torch. Copies over
the bus, the GPU's products and the CPU run at the same time, so a layer is done when the slowest of
them is. The experts with the fewest rows are the cheapest on the CPU and cost the same copy as any
other: they go to the CPU, as many as make both sides finish together. The choice follows from the
row counts and the measured rates alone, never from how far a copy has come. Where a chunk is so long
that the bus would wait for its rows, all experts are copied before they are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Share of the experts expected to be copied anyway that are copied before their rows are known.
_AHEAD_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class LayerRates:
    """One layer's experts. Layers of equal types and shapes share an object."""

    copy_s: float  # seconds to copy one expert
    cpu_rows: tuple[int, ...]  # ascending: rows per expert that were measured
    cpu_s: tuple[float, ...]  # seconds of the whole CPU per expert with that many rows
    cpu_start_s: float = 0.0  # seconds to begin and end a run of any size

    def cpu_seconds(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Seconds of each expert by its rows; 0 for none. Linear between and beyond the points."""
        rows, seconds = np.array(self.cpu_rows, np.float64), np.array(self.cpu_s)
        found = np.interp(counts, rows, seconds)
        if len(rows) > 1:
            slope = (seconds[-1] - seconds[-2]) / (rows[-1] - rows[-2])
            found += np.maximum(counts - rows[-1], 0) * max(slope, 0.0)
        return np.where(counts > 0, found, 0.0)


@dataclass(frozen=True, slots=True)
class SplitRates:
    """What is common to all layers; seconds as linear functions of the chunk's tokens."""

    layers: Sequence[LayerRates]
    gpu_s: tuple[float, float]  # the GPU's products of one layer: fixed, per token
    # From a layer's last product until the CPU has the next layer's rows: fixed, per token.
    gap_s: tuple[float, float]
    overlap: bool  # False: copies block the host, so copies and CPU take turns
    row_s: float = 0.0  # to bring one token's row to the CPU, part of the gap

    def window(self, tokens: int) -> float:
        """Seconds per layer in which the bus would idle if it waited for the rows."""
        return self.gap(tokens) + self.gpu_s[0] + self.gpu_s[1] * tokens

    def gap(self, tokens: int) -> float:
        return self.gap_s[0] + self.gap_s[1] * tokens

    def ahead(self, layer: int, tokens: int, top_k: int, num_experts: int) -> int:
        """Experts 0 .. n - 1 to copy before the layer's rows are known."""
        if not self.overlap:
            return 0
        counts = _expected_counts(tokens, top_k, num_experts)
        streamed = int(self.choose(layer, tokens, counts, 0).sum())
        fits = int(np.ceil(self.window(tokens) / self.layers[layer].copy_s))
        return min(int(_AHEAD_SHARE * streamed), fits)

    def streams_all(self, layer: int, tokens: int, top_k: int, num_experts: int) -> bool:
        """Whether copying every expert before its rows are known beats sharing them.

        The bus then never waits for rows, and none of them are brought to the CPU.
        """
        if not self.overlap:
            return False
        counts = _expected_counts(tokens, top_k, num_experts)
        ahead = self.ahead(layer, tokens, top_k, num_experts)
        _, shared = self._seconds(layer, tokens, counts, ahead)
        alone = max(
            num_experts * self.layers[layer].copy_s, self.window(tokens) - self.row_s * tokens
        )
        return alone < float(shared.min())

    def choose(
        self, layer: int, tokens: int, counts: npt.NDArray[np.int64], ahead: int
    ) -> npt.NDArray[np.bool_]:
        """bool [E]: the experts to stream. counts: rows of each; the first `ahead` are copied."""
        by_rows, seconds = self._seconds(layer, tokens, counts, ahead)
        streamed = np.zeros(len(counts), np.bool_)
        streamed[:ahead] = True
        streamed[by_rows[: int(np.argmin(seconds))]] = True
        return streamed

    def _seconds(
        self, layer: int, tokens: int, counts: npt.NDArray[np.int64], ahead: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Experts that are not copied ahead, most rows first, and the time with the first n more."""
        rates = self.layers[layer]
        open_ = ahead + np.flatnonzero(counts[ahead:] > 0)
        by_rows = open_[np.argsort(-counts[open_], kind="stable")]
        cpu = rates.cpu_seconds(counts[by_rows])
        cpu_left = np.concatenate([[0.0], np.cumsum(cpu[::-1])])[::-1]  # after the first n
        more = np.arange(len(by_rows) + 1)
        if self.overlap:
            copies = (ahead + more) * rates.copy_s
            streams = more * rates.copy_s + np.where(ahead + more > 0, self.window(tokens), 0.0)
            begin = self.gap(tokens) + rates.cpu_start_s
            host = np.where(cpu_left > 0, begin + cpu_left, 0.0)
            total = np.maximum(np.maximum(copies, streams), host)
        else:
            streams = np.where(more > 0, self.window(tokens), 0.0)
            total = more * rates.copy_s + streams
            total += np.where(cpu_left > 0, rates.cpu_start_s + cpu_left, 0.0)
        return by_rows, total


def _expected_counts(tokens: int, top_k: int, num_experts: int) -> npt.NDArray[np.int64]:
    """Rows of each expert, the used ones first, when tokens choose evenly."""
    pairs = tokens * top_k
    used = num_experts * (1.0 - (1.0 - 1.0 / num_experts) ** pairs)
    counts = np.zeros(num_experts, np.int64)
    counts[: round(used)] = max(1, round(pairs / max(used, 1.0)))
    return counts
