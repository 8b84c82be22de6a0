"""PNG plots: throughput and latency of a serving run, and an expert layer against its bound.

matplotlib comes with the `dev` extra; without it the run says so and goes on.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.stats import median

# One look for both plots: title and the curves as (metric, label).
_PLOTS = {
    "throughput": (
        "tokens/s",
        (
            ("decode_tokens_per_s", "decode, all clients together"),
            ("total_tokens_per_s", "with prefill and waiting"),
            ("client_tokens_per_s", "one client (median)"),
        ),
    ),
    "latency": (
        "milliseconds",
        (
            ("ttft_p50_ms", "time to first token, p50"),
            ("itl_p50_ms", "inter-token, p50"),
            ("itl_p99_ms", "inter-token, p99"),
        ),
    ),
}


def draw(cells: Sequence[Mapping[str, Any]], stem: Path, title: str) -> list[Path]:
    """Write <stem>-throughput.png and <stem>-latency.png; returns the paths.

    cells: records with "clients", "median" {metric: value} and "runs" {metric: [values]}; the
    error bars are the range of the runs. Raises BenchError when matplotlib is missing.
    """
    plt = _pyplot()
    ordered = sorted(cells, key=lambda cell: int(cell["clients"]))
    written = []
    for name, (unit, curves) in _PLOTS.items():
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for metric, label in curves:
            _curve(axes, ordered, metric, label)
        axes.set_xlabel("clients at once")
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
        axes.set_xticks([int(cell["clients"]) for cell in ordered])
        axes.set_title(title, fontsize=10)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        path = stem.with_name(f"{stem.name}-{name}.png")
        figure.savefig(path, dpi=120)
        plt.close(figure)
        written.append(path)
    return written


def draw_layer(
    path: Path,
    title: str,
    tokens: Sequence[int],
    seconds: Sequence[Sequence[float]],
    bounds: Sequence[float],
) -> None:
    """Write a plot of an expert layer's time over concurrent tokens beside its bound.

    seconds: of every run, by number of tokens; the line is the best run, the bar reaches to the
    median. bounds: seconds that reading the distinct experts takes. Raises BenchError when
    matplotlib is missing.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    best = [1e6 * min(times) for times in seconds]
    to_median = [1e6 * median(times) - low for times, low in zip(seconds, best, strict=True)]
    zeros = [0.0] * len(best)
    axes.errorbar(tokens, best, yerr=[zeros, to_median], marker="o", capsize=3, label="measured")
    limit = [1e6 * bound for bound in bounds]
    axes.plot(tokens, limit, "k--", label="distinct experts' bytes / read bandwidth")
    axes.fill_between(tokens, limit, [1.1 * x for x in limit], alpha=0.2, label="+ 10 %")
    axes.set_xlabel("tokens of the step (concurrent decodes)")
    axes.set_ylabel("microseconds per layer")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=9)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pyplot() -> Any:
    try:
        mpl = importlib.import_module("matplotlib")
        mpl.use("Agg")  # draws without a display
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise BenchError(
            "no plots: matplotlib is not installed (pip install 'kt_async[dev]' has it)"
        ) from None


def _curve(axes: Any, cells: Sequence[Mapping[str, Any]], metric: str, label: str) -> None:
    """One line with its range; cells where the metric could not be measured are left out."""
    points = [
        (int(cell["clients"]), cell["median"][metric], cell["runs"][metric])
        for cell in cells
        if cell["median"].get(metric) is not None
    ]
    if not points:
        return
    xs = [x for x, _, _ in points]
    ys = [y for _, y, _ in points]
    low = [y - min(runs) for _, y, runs in points]
    high = [max(runs) - y for _, y, runs in points]
    axes.errorbar(xs, ys, yerr=[low, high], marker="o", capsize=3, label=label)
