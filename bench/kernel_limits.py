"""What a machine can do at most, and how a measurement stands to it: for bench/kernels.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench import stats
from kt_async.ffi.matrix import peak_rate
from kt_async.ffi.pool import Pool

FLOATS = ("F32", "F16", "BF16")
PROMPT_ROWS = 32  # so many rows or tokens are multiplied as a prompt's


@dataclass(frozen=True)
class Work:
    """What one run does: bytes of weights, multiply-adds, rows or tokens."""

    num_bytes: float
    macs: float
    count: int


@dataclass(frozen=True)
class Limits:
    """Bytes and multiply-adds per second that all workers reach together."""

    read: float
    integer: float | None
    bf16: float | None
    f32: float | None
    has_tiles: bool = False

    def peak(self, type_name: str, count: int) -> float | None:
        """The peak that bounds products of `count` rows with this type's weights."""
        if type_name not in FLOATS:
            if self.has_tiles and count >= PROMPT_ROWS:
                return self.bf16
            return self.integer or self.f32
        # A bf16 tile multiplies faster than f32 units do, but takes two passes (high and low part).
        halved = (self.bf16 or 0) / 2
        return max(halved, self.f32 or 0) if type_name == "BF16" else self.f32

    def best_of(self, other: Limits) -> Limits:
        """The higher one of each."""
        peaks = [(self.integer, other.integer), (self.bf16, other.bf16), (self.f32, other.f32)]
        best = [max(x or 0, y or 0) or None for x, y in peaks]
        integer, bf16, f32 = best
        read = max(self.read, other.read)
        return Limits(read, integer, bf16, f32, has_tiles=self.has_tiles)

    def bound(self, type_name: str, work: Work) -> tuple[float, str]:
        """The shortest possible time in seconds, and what sets it: `memory` or `products`."""
        peak = self.peak(type_name, work.count)
        memory, products = work.num_bytes / self.read, work.macs / (peak or float("inf"))
        return max((memory, "memory"), (products, "products"))


def measure_read(pool: Pool, num_bytes: int) -> float:
    """Read bandwidth of this pool, over twice num_bytes: four times a large L3 cache.

    A Xeon that reads 210 GB/s read 600 MB again and again at up to 316: its L3 has 300.
    """
    return pool.read_bandwidth(2 * num_bytes, 4)


def measure_limits(pool: Pool, num_bytes: int) -> Limits:
    """Read bandwidth and peaks of this pool."""
    integer, bf16, f32 = (peak_rate(pool, kind) for kind in range(3))
    read = measure_read(pool, num_bytes)
    return Limits(read, integer, bf16, f32, has_tiles="amx" in pool.describe())


def report(
    label: str, name: str, times: Sequence[float], limits: Limits, work: Work
) -> tuple[list[str], dict[str, object]]:
    """One table row and one result record."""
    best = min(times)
    peak = limits.peak(name, work.count)
    bound, bound_by = limits.bound(name, work)
    shares: dict[str, float | None] = {
        "share": bound / best,
        "bandwidth_share": work.num_bytes / best / limits.read,
        "peak_share": work.macs / best / peak if peak else None,
    }
    row = [
        label,
        stats.number(best * 1e6),
        stats.number(stats.median(times) * 1e6),
        stats.number(bound * 1e6),
        bound_by,
        stats.number(work.num_bytes / best / 1e9),
        stats.number(work.macs / best / 1e9),
        *(f"{100 * value:.0f} %" if value else "-" for value in shares.values()),
    ]
    record: dict[str, object] = {
        "label": label,
        "bytes": work.num_bytes,
        "macs": work.macs,
        "seconds": list(times),
        "bound_by": bound_by,
        **shares,
    }
    return row, record
