"""Which routed experts of a prompt chunk the GPU computes from a copy, and which the CPU computes.

A cost model over measured rates (engine/cuda/calibrate.py): pure arithmetic, no torch. Copies over
the bus, the GPU's products and the CPU run at the same time, so a layer is done when the slowest of
them is. The experts with the fewest rows are the cheapest on the CPU and cost the same copy as any
other: they go to the CPU, as many as make both sides finish together. The choice follows from the
row counts and the measured rates alone, never from how far a copy has come.
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

    def window(self, tokens: int) -> float:
        """Seconds per layer in which the bus would idle if it waited for the rows."""
        return self.gap(tokens) + self.gpu_s[0] + self.gpu_s[1] * tokens

    def gap(self, tokens: int) -> float:
        return self.gap_s[0] + self.gap_s[1] * tokens

    def ahead(self, layer: int, tokens: int, top_k: int, num_experts: int) -> int:
        """Experts 0 .. n - 1 to copy before the layer's rows are known."""
        if not self.overlap:
            return 0
        pairs = tokens * top_k
        used = num_experts * (1.0 - (1.0 - 1.0 / num_experts) ** pairs)
        counts = np.zeros(num_experts, np.int64)
        counts[: round(used)] = max(1, round(pairs / max(used, 1.0)))
        streamed = int(self.choose(layer, tokens, counts, 0).sum())
        fits = int(np.ceil(self.window(tokens) / self.layers[layer].copy_s))
        return min(int(_AHEAD_SHARE * streamed), fits)

    def choose(
        self, layer: int, tokens: int, counts: npt.NDArray[np.int64], ahead: int
    ) -> npt.NDArray[np.bool_]:
        """bool [E]: the experts to stream. counts: rows of each; the first `ahead` are copied."""
        rates = self.layers[layer]
        streamed = np.zeros(len(counts), np.bool_)
        streamed[:ahead] = True
        open_ = np.flatnonzero((counts > 0) & ~streamed)
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
        best = int(np.argmin(total))
        streamed[by_rows[:best]] = True
        return streamed
