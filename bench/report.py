"""Compare two result files of run.py (or peers.py): base against new, cell by cell.

Exit code 0 when nothing got worse beyond noise, 1 when something did or a cell is missing, 2 when
the files cannot be compared. Noise of a figure: three robust standard deviations of both files'
runs together, at least --floor.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench`, when run as a script

from bench import record, stats
from bench.errors import BenchError

_SIGMAS = 3.0
_FLOOR = 0.05
_CELL_KEYS = ("server", "model", "clients", "prompt_tokens", "max_tokens")

# Metric -> whether more is better. Others are in the files but are not judged: their maximum or
# tail over a few short runs is mostly luck.
JUDGED = {
    "decode_tokens_per_s": True,
    "total_tokens_per_s": True,
    "prefill_tokens_per_s": True,
    "ttft_p50_ms": False,
    "itl_p50_ms": False,
    "ready_s": False,
    "first_byte_ms": False,
    "idle_cpu_percent": False,
    "host_us_per_step": False,
    "peak_rss_bytes": False,
}
# Differences below these are nothing, whatever their ratio: 0.1 % and 0.3 % of idle CPU are equal.
_ABSOLUTE_FLOOR = {"idle_cpu_percent": 0.5, "first_byte_ms": 2.0, "ready_s": 0.3}

Cell = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Line:
    """One compared figure. change: (new - base) / base; verdict: "same", "better" or "WORSE"."""

    cell: Cell
    metric: str
    base: float
    new: float
    change: float
    noise: float
    verdict: str


def cells_of(records: Sequence[Mapping[str, Any]]) -> dict[Cell, dict[str, list[float]]]:
    """Samples by cell and metric; records of the same cell add up. Nulls are left out."""
    cells: dict[Cell, dict[str, list[float]]] = {}
    for entry in records:
        key = (
            ("kind", str(entry["kind"])),
            *((name, str(entry[name])) for name in _CELL_KEYS if name in entry),
        )
        runs = entry.get("runs", {})
        if not isinstance(runs, Mapping):
            raise BenchError("a record's runs is not an object of lists")
        cell = cells.setdefault(key, {})
        for metric, values in runs.items():
            if metric in JUDGED:
                cell.setdefault(metric, []).extend(v for v in values if v is not None)
    return cells


def compare(
    cell: Cell, metric: str, base: Sequence[float], new: Sequence[float], floor: float = _FLOOR
) -> Line:
    """Judge one figure from the samples of both files (none may be empty)."""
    old_median, new_median = stats.median(base), stats.median(new)
    change = (new_median - old_median) / old_median if old_median else math.inf
    if old_median == new_median:
        change = 0.0
    noise = max(floor, _SIGMAS * math.hypot(stats.noise(base), stats.noise(new)))
    verdict = "same"
    is_small = abs(new_median - old_median) <= _ABSOLUTE_FLOOR.get(metric, 0.0)
    if abs(change) > noise and not is_small:
        verdict = "better" if (change > 0) == JUDGED[metric] else "WORSE"
    return Line(cell, metric, old_median, new_median, change, noise, verdict)


def compare_files(
    base: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], floor: float = _FLOOR
) -> tuple[list[Line], list[str]]:
    """All compared figures, and a sentence for each cell that the new file lacks.

    Raises BenchError when the files have no figure in common.
    """
    old_cells, new_cells = cells_of(base), cells_of(new)
    lines: list[Line] = []
    missing: list[str] = []
    for cell, metrics in old_cells.items():
        others = new_cells.get(cell, {})
        lines.extend(
            compare(cell, metric, samples, others[metric], floor)
            for metric, samples in metrics.items()
            if samples and others.get(metric)
        )
        if lost := [name for name, samples in metrics.items() if samples and not others.get(name)]:
            what = ", ".join(lost) if others else "such cell"
            missing.append(f"{describe(cell)}: no {what} in the new file")
    if not lines:
        raise BenchError("the two files have no figure in common")
    return lines, missing


def describe(cell: Cell) -> str:
    """ "serve clients 4 prompt_tokens 64" and so on."""
    (_, kind), *rest = cell
    return " ".join([kind, *(f"{name} {value}" for name, value in rest)])


def render(lines: Sequence[Line]) -> str:
    """The table of all compared figures."""
    return stats.table(
        ("cell", "figure", "base", "new", "change", "noise", ""),
        [
            (
                describe(line.cell),
                line.metric,
                stats.number(line.base),
                stats.number(line.new),
                f"{100 * line.change:+.1f} %",
                f"{100 * line.noise:.1f} %",
                line.verdict,
            )
            for line in lines
        ],
    )


def warnings(base: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why the comparison may not be fair: another CPU, other work, or fewer than three runs."""
    found = []
    cpus = [{(r.get("machine") or {}).get("cpu") for r in records} for records in (base, new)]
    if cpus[0] != cpus[1]:
        found.append("the files come from different CPUs: compare ratios, not times")
    machines = [r.get("machine") or {} for r in (*base, *new)]
    if any(m.get("load_1min", 0) > 0.5 * m.get("cores", math.inf) for m in machines):
        found.append("the machine was busy with other work: differences may come from that")
    # Start-up and memory are there once or a few times; the others are what runs repeat.
    repeated = [r for r in (*base, *new) if r["kind"] in ("serve", "prefill", "peers")]
    counts = [len(values) for r in repeated for values in (r.get("runs") or {}).values()]
    if counts and min(counts) < 3:
        found.append("fewer than three runs of a figure: its noise is a guess")
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the comparison; the exit code is the verdict."""
    parser = argparse.ArgumentParser(description="Compare two result files; fail beyond noise.")
    parser.add_argument("base", type=Path, help="result file to compare with")
    parser.add_argument("new", type=Path, help="result file to judge")
    parser.add_argument("--floor", type=float, default=_FLOOR,
                        help="smallest relative change that counts (%(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        base, new = record.read(args.base), record.read(args.new)
        lines, missing = compare_files(base, new, args.floor)
    except BenchError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(render(lines))
    for sentence in [*missing, *(f"note: {text}" for text in warnings(base, new))]:
        print(sentence)
    worse = sum(line.verdict == "WORSE" for line in lines)
    print(f"{len(lines)} figures compared, {worse} worse beyond noise, {len(missing)} missing")
    return 1 if worse or missing else 0


if __name__ == "__main__":
    sys.exit(main())
