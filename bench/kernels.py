"""Time the CPU kernels against what this machine can do: read bandwidth and peak multiply-adds.

    python bench/kernels.py                         # Q4_K Q6_K Q8_0 BF16, linears and expert layers
    python bench/kernels.py --types Q4_K --rows 1,8,512 --layers none --isa avx2
    python bench/kernels.py --types all --rows 1,8 --layers none

Limits are measured in the same run. Outputs are checked against gguf's decoder before anything is
timed. "share" is the time the machine's limits allow (bytes / bandwidth or multiply-adds / peak,
whichever is longer) over the best time; weights rotate through more memory than the caches hold.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, quants

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from bench import stats
from bench.record import ResultFile
from kt_async.errors import KtError
from kt_async.ffi.experts import experts_multiply
from kt_async.ffi.host import ISA_NAMES, isa_number, query_host
from kt_async.ffi.matrix import Matrix, dequantize, peak_rate, type_info
from kt_async.ffi.pool import Pool
from kt_async.model.synthetic import random_blocks
from kt_async.weights.gguf_header import TYPE_IDS

F32 = npt.NDArray[np.float32]
_FLOATS = ("F32", "F16", "BF16")
_ALL = (
    "Q4_K Q5_K Q6_K Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 IQ4_NL IQ4_XS MXFP4 BF16 F16 F32 "
    "Q2_K Q3_K IQ1_S IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S"
)
_COLS = 2048
# Relative error of a product: f32 sums; activations rounded to int8 (uniform error of a 127th).
_TOLERANCE = {True: 1e-5, False: 2e-2}


@dataclass(frozen=True)
class Shape:
    """A routed-expert layer: hidden size, expert width, number of experts, experts per token."""

    hidden: int
    width: int
    experts: int
    top_k: int


# DeepSeek-V3 has 256 experts; 32 are enough to defeat the caches and fit in memory.
_SHAPES = {"qwen3": Shape(2048, 768, 128, 8), "deepseek3": Shape(7168, 2048, 32, 8)}


@dataclass(frozen=True)
class Limits:
    """Bytes and multiply-adds per second that all workers reach together."""

    read: float
    integer: float | None
    bf16: float | None
    f32: float | None

    def peak(self, type_name: str) -> float | None:
        """The peak that bounds products with this type's weights."""
        if type_name not in _FLOATS:
            return self.integer or self.f32
        # A bf16 tile multiplies faster than f32 units do, but takes two passes (high and low part).
        halved = (self.bf16 or 0) / 2
        return max(halved, self.f32 or 0) if type_name == "BF16" else self.f32

    def seconds(self, type_name: str, num_bytes: float, macs: float) -> float:
        """The shortest possible time."""
        return max(num_bytes / self.read, macs / (self.peak(type_name) or float("inf")))


def measure_limits(pool: Pool, num_bytes: int) -> Limits:
    """Read bandwidth and peaks of this pool."""
    rates = [peak_rate(pool, kind) for kind in range(3)]
    return Limits(pool.read_bandwidth(num_bytes, 8), *rates)


def best_time(run: Callable[[int], object], repeats: int, least: float = 0.3) -> list[float]:
    """Seconds of each of at least `repeats` runs and at most `least` seconds more."""
    run(0)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < repeats or (time.perf_counter() - start < least and len(times) < 200):
        before = time.perf_counter()
        run(len(times) + 1)
        times.append(time.perf_counter() - before)
    return times


def make_matrix(
    pool: Pool, name: str, rows: int, cols: int, experts: int, rng: np.random.Generator
) -> tuple[Matrix, npt.NDArray[np.uint8]]:
    """Random weights: about 4 MiB drawn, repeated with an odd period."""
    info = type_info(TYPE_IDS[name])
    blocks = experts * rows * cols // info.block_size
    drawn = min(blocks, (4 << 20) // info.block_bytes | 1)
    tile = random_blocks(name, drawn, 0.05, rng)
    data = np.resize(tile, (blocks, info.block_bytes)).reshape(-1)
    return Matrix(pool, TYPE_IDS[name], data, rows, cols, experts), data


def check(name: str, packed: Matrix, data: npt.NDArray[np.uint8], x: F32, got: F32) -> None:
    """Compare the first rows of a product with gguf's decoder. Raises KtError."""
    info = type_info(TYPE_IDS[name])
    rows = min(64, packed.rows)
    raw = data[: info.num_bytes(rows * packed.cols)]
    if name in _FLOATS:
        weights = dequantize(TYPE_IDS[name], raw)
    else:
        weights = quants.dequantize(raw, GGMLQuantizationType[name])
    exact = x.astype(np.float64) @ weights.reshape(rows, packed.cols).astype(np.float64).T
    error = np.linalg.norm(got[:, :rows] - exact) / np.linalg.norm(exact)
    if not error < _TOLERANCE[name in _FLOATS]:
        raise KtError(f"{name}: the product is wrong by {error:.1e}")


def report(
    label: str, name: str, times: Sequence[float], limits: Limits, num_bytes: float, macs: float
) -> tuple[list[str], dict[str, object]]:
    """One table row and one result record."""
    best = min(times)
    peak = limits.peak(name)
    shares: dict[str, float | None] = {
        "share": limits.seconds(name, num_bytes, macs) / best,
        "bandwidth_share": num_bytes / best / limits.read,
        "peak_share": macs / best / peak if peak else None,
    }
    row = [
        label,
        stats.number(best * 1e6),
        stats.number(stats.median(times) * 1e6),
        stats.number(num_bytes / best / 1e9),
        stats.number(macs / best / 1e9),
        *(f"{100 * value:.0f} %" if value else "-" for value in shares.values()),
    ]
    record: dict[str, object] = {
        "label": label,
        "bytes": num_bytes,
        "macs": macs,
        "seconds": list(times),
        **shares,
    }
    return row, record


class Bench:
    """One run: a pool, its limits, the table so far and the result file."""

    def __init__(self, args: argparse.Namespace, pool: Pool) -> None:
        self._args = args
        self._pool = pool
        self._rng = np.random.default_rng(args.seed)
        self._file = ResultFile(args.output or ResultFile.default_path("kernels"))
        self.limits = measure_limits(pool, args.megabytes << 20)
        self.rows: list[list[str]] = []

    def add(
        self, kind: str, label: str, name: str, times: list[float], work: Sequence[float]
    ) -> None:
        """Record and print one measurement; work: bytes read, multiply-adds."""
        row, record = report(label, name, times, self.limits, *work)
        self.rows.append(row)
        self._file.append(kind, {"type": name, "pool": self._pool.describe(), **record})

    def linear(self, name: str) -> None:
        """Products with 1 .. n rows of activations, two matrices in turn."""
        info = type_info(TYPE_IDS[name])
        row_bytes = info.num_bytes(_COLS)
        rows = (self._args.megabytes << 20) // row_bytes // 64 * 64
        packed, data = make_matrix(self._pool, name, rows, _COLS, 2, self._rng)
        with packed:
            for count in self._args.rows:
                x = self._rng.standard_normal((count, _COLS), np.float32)
                out = packed.multiply(x)
                check(name, packed, data, x, out)

                def run(turn: int, x: F32 = x, out: F32 = out) -> None:
                    packed.multiply(x, turn % 2, out)

                times = best_time(run, self._args.repeats)
                work = (rows * row_bytes, float(rows) * _COLS * count)
                self.add("kernel.linear", f"{name} linear, {count} rows", name, times, work)

    def layer(self, shape_name: str, up_type: str, down_type: str) -> None:
        """A routed-expert layer with uniformly random routing, drawn anew for every run."""
        s = _SHAPES[shape_name]
        gate, _ = make_matrix(self._pool, up_type, s.width, s.hidden, s.experts, self._rng)
        up, _ = make_matrix(self._pool, up_type, s.width, s.hidden, s.experts, self._rng)
        down, _ = make_matrix(self._pool, down_type, s.hidden, s.width, s.experts, self._rng)
        each = (gate.num_bytes + up.num_bytes + down.num_bytes) / s.experts
        with gate, up, down:
            for tokens in self._args.tokens:
                x = self._rng.standard_normal((tokens, s.hidden), np.float32)
                weights = np.full((tokens, s.top_k), 1 / s.top_k, np.float32)
                draws = [self._route(tokens, s) for _ in range(16)]
                out = np.empty((tokens, s.hidden), np.float32)

                def run(
                    turn: int,
                    x: F32 = x,
                    weights: F32 = weights,
                    draws: list[npt.NDArray[np.int32]] = draws,
                    out: F32 = out,
                ) -> None:
                    experts_multiply((gate, up, down), x, draws[turn % 16], weights, out)

                times = best_time(run, self._args.repeats)
                distinct = float(np.mean([len(np.unique(ids)) for ids in draws]))
                macs = 3.0 * s.hidden * s.width * s.top_k * tokens
                label = f"{shape_name} {up_type}/{down_type}, {tokens} tokens"
                self.add("kernel.layer", label, up_type, times, (each * distinct, macs))

    def _route(self, tokens: int, shape: Shape) -> npt.NDArray[np.int32]:
        keys = self._rng.random((tokens, shape.experts))
        return np.argsort(keys, axis=1)[:, : shape.top_k].astype(np.int32)

    def table(self) -> str:
        """All measurements so far."""
        header = ["kernel", "best us", "median us", "GB/s", "GMAC/s", "share", "of read", "of peak"]
        return stats.table(header, self.rows)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument("--isa", default="auto", choices=("auto", *ISA_NAMES))
    parser.add_argument("--threads", type=int, default=0, help="0: one per physical core")
    parser.add_argument("--types", default="Q4_K,Q6_K,Q8_0,BF16", help="comma-separated, or all")
    parser.add_argument("--rows", type=numbers, default=[1, 2, 4, 8, 64, 512], metavar="M,..")
    parser.add_argument(
        "--tokens", type=numbers, default=[1, 2, 4, 8, 16, 128, 512], metavar="T,.."
    )
    parser.add_argument(
        "--layers", default="qwen3:Q4_K:Q6_K,qwen3:Q8_0:Q8_0", help="shape:up:down,.. or none"
    )
    parser.add_argument("--megabytes", type=int, default=96, help="weights of one linear product")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON lines; default results/kernels-*.jsonl")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; 1 and one sentence when a type, shape or product is wrong."""
    args = parse(argv)
    isa = isa_number(args.isa)
    try:
        with Pool(args.threads, isa=isa) as pool:
            bench = Bench(args, pool)
            limits = bench.limits
            print(query_host().cpu_name, "|", pool.describe())
            peaks = {"integer": limits.integer, "bf16": limits.bf16, "f32": limits.f32}
            text = ", ".join(f"{n} {v / 1e9:.0f} GMAC/s" for n, v in peaks.items() if v)
            print(f"limits: read {limits.read / 1e9:.1f} GB/s, {text}", flush=True)
            for name in _ALL.split() if args.types == "all" else args.types.split(","):
                if name != "none":
                    bench.linear(name)
            for layer in args.layers.split(","):
                if layer != "none":
                    bench.layer(*layer.split(":"))
            print(bench.table())
    except (KtError, KeyError, ValueError, TypeError) as error:
        print(f"bench/kernels.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
