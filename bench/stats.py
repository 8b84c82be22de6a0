"""Percentiles, spread, noise and plain text tables for the benchmarks. Pure: no I/O, no clock."""

from __future__ import annotations

import math
from collections.abc import Sequence

_MAD_TO_SIGMA = 1.4826  # a normal distribution's sigma in units of its median absolute deviation


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100) with linear interpolation between neighbours.

    Raises ValueError on an empty sequence or a q outside 0..100.
    """
    if not values:
        raise ValueError("percentile of no values")
    if not 0 <= q <= 100:
        raise ValueError(f"percentile {q} is outside 0..100")
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Sequence[float]) -> float:
    """The 50th percentile."""
    return percentile(values, 50)


def spread(values: Sequence[float]) -> float:
    """Half the range of the values as a share of their median; 0 for one value."""
    middle = median(values)
    if middle == 0:
        return 0.0
    return (max(values) - min(values)) / 2 / abs(middle)


def noise(values: Sequence[float]) -> float:
    """A robust relative standard deviation: scaled median absolute deviation over the median."""
    middle = median(values)
    if middle == 0:
        return 0.0
    return _MAD_TO_SIGMA * median([abs(value - middle) for value in values]) / abs(middle)


def number(value: float | None, digits: int = 3) -> str:
    """A figure with about `digits` significant digits and no exponent; "-" for None."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to the widest cell; the first is left-aligned, the others right-aligned."""
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"every row needs {len(header)} cells")
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
