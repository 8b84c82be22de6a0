"""What bench/kernels.py times: products and routed-expert layers."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, quants

from bench import stats
from bench.kernel_limits import FLOATS, PROMPT_ROWS, Work, measure_limits, measure_read, report
from bench.record import ResultFile
from kt_async.errors import KtError
from kt_async.ffi.experts import bind_experts
from kt_async.ffi.matrix import Matrix, dequantize, type_info
from kt_async.ffi.pool import Pool
from kt_async.model.synthetic import random_blocks
from kt_async.weights.gguf_header import TYPE_IDS

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
_COLS = 2048
_PROMPT_OUTPUTS = 4096
# Relative error of a product: f32 sums; activations rounded to int8 (uniform error of a 127th).
_TOLERANCE = {True: 1e-5, False: 2e-2}


@dataclass(frozen=True)
class Shape:
    """A routed-expert layer: hidden size, expert width, number of experts, experts per token."""

    hidden: int
    width: int
    experts: int
    top_k: int


# DeepSeek-V3 has 256 experts; 64 are enough to defeat the caches and fit in memory.
SHAPES = {"qwen3": Shape(2048, 768, 128, 8), "deepseek3": Shape(7168, 2048, 64, 8)}


@dataclass
class Curve:
    """One expert layer over numbers of tokens.

    seconds: of every run; bytes: that a run reads; reads: bytes a second the machine read around it.
    """

    title: str
    tokens: list[int] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)


def best_time(
    run: Callable[[int], object],
    repeats: int,
    before: Callable[[], object] = lambda: None,
    least: float = 0.3,
) -> list[float]:
    """Seconds of each of at least `repeats` runs, more while they take less than `least` together.

    before: called in front of every run, not timed.
    """
    run(0)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < repeats or (time.perf_counter() - start < least and len(times) < 200):
        before()
        begin = time.perf_counter()
        run(len(times) + 1)
        times.append(time.perf_counter() - begin)
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
    if name in FLOATS:
        weights = dequantize(TYPE_IDS[name], raw)
    else:
        weights = quants.dequantize(raw, GGMLQuantizationType[name])
    exact = x.astype(np.float64) @ weights.reshape(rows, packed.cols).astype(np.float64).T
    error = np.linalg.norm(got[:, :rows] - exact) / np.linalg.norm(exact)
    if not error < _TOLERANCE[name in FLOATS]:
        raise KtError(f"{name}: the product is wrong by {error:.1e}")


class Bench:
    """One run: a pool, its limits, the table so far and the result file."""

    def __init__(self, args: argparse.Namespace, pool: Pool, output: ResultFile) -> None:
        self._args = args
        self._pool = pool
        self._rng = np.random.default_rng(args.seed)
        self._file = output
        self._measured: list[tuple[str, str, str, list[float], Work, float]] = []
        self.limits = measure_limits(pool, args.megabytes << 20)
        self._read = self.limits.read
        self.curves: list[Curve] = []

    def add(self, kind: str, label: str, name: str, times: list[float], work: Work) -> float:
        """Keep one measurement, with the read bandwidth around it, which is returned.

        On a shared machine it changes within a run: the better one of just before and just after
        counts.
        """
        before, self._read = self._read, measure_read(self._pool, self._args.megabytes << 20)
        nearby = max(before, self._read)
        self._measured.append((kind, label, name, times, work, nearby))
        return nearby

    def finish(self) -> str:
        """The table of all measurements, which go to the result file.

        The peaks are measured once more: what the machine reached at the better moment counts.
        """
        self.limits = self.limits.best_of(measure_limits(self._pool, self._args.megabytes << 20))
        rows = []
        for kind, label, name, times, work, read in self._measured:
            limits = replace(self.limits, read=read)
            row, record = report(label, name, times, limits, work)
            rows.append(row)
            self._file.append(
                kind, {"type": name, "pool": self._pool.describe(), **record, **asdict(limits)}
            )
        header = ["kernel", "best us", "median us", "bound us", "by"]
        header += ["GB/s", "GMAC/s", "share", "of read", "of peak"]
        return stats.table(header, rows)

    def linear(self, name: str) -> None:
        """Products with 1 .. n rows of activations, several matrices in turn.

        Generated rows: two large ones. Prompt rows: many of a usual size, or writing the result
        would take the time.
        """
        row_bytes = type_info(TYPE_IDS[name]).num_bytes(_COLS)
        rows = (self._args.megabytes << 20) // row_bytes // 64 * 64
        few = [count for count in self._args.rows if count < PROMPT_ROWS]
        many = [count for count in self._args.rows if count >= PROMPT_ROWS]
        if few:
            self._products(name, rows, 2, few)
        if many:
            self._products(
                name, min(rows, _PROMPT_OUTPUTS), max(2, 2 * rows // _PROMPT_OUTPUTS), many
            )

    def _products(self, name: str, rows: int, turns: int, counts: list[int]) -> None:
        num_bytes = rows * type_info(TYPE_IDS[name]).num_bytes(_COLS)
        packed, data = make_matrix(self._pool, name, rows, _COLS, turns, self._rng)
        with packed:
            for count in counts:
                x = self._rng.standard_normal((count, _COLS), np.float32)
                is_prompt = count >= PROMPT_ROWS
                out = packed.multiply(x, is_prompt=is_prompt)
                check(name, packed, data, x, out)

                def run(turn: int, x: F32 = x, out: F32 = out, is_prompt: bool = is_prompt) -> None:
                    packed.multiply(x, turn % turns, out, is_prompt=is_prompt)

                times = best_time(run, self._args.repeats)
                work = Work(num_bytes, float(rows) * _COLS * count, count)
                self.add("kernel.linear", f"{name} linear, {count} rows", name, times, work)

    def layer(self, shape_name: str, up_type: str, down_type: str) -> None:
        """A routed-expert layer with uniformly random routing, drawn anew for every run."""
        s = SHAPES[shape_name]
        matrices = self._make_layer(s, up_type, down_type)
        num_bytes = sum(matrix.num_bytes for matrix in matrices)
        each = num_bytes / s.experts
        curve = Curve(f"{shape_name} {up_type}/{down_type}")
        small = self._make_layer(Shape(256, 256, s.top_k, s.top_k), up_type, down_type)
        with contextlib.ExitStack() as stack:
            for matrix in (*matrices, *small):
                stack.enter_context(matrix)
            flush = stack.enter_context(self._make_flush())
            for tokens in self._args.tokens:
                draws, distinct = self._routes(tokens, s)
                times = self._layer_times(matrices, small, flush, s, draws)
                work = Work(each * distinct, 3.0 * s.hidden * s.width * s.top_k * tokens, tokens)
                label = f"{curve.title}, {tokens} tokens"
                curve.reads.append(self.add("kernel.layer", label, up_type, times, work))
                curve.tokens.append(tokens)
                curve.seconds.append(times)
                curve.bytes.append(work.num_bytes)
        self.curves.append(curve)

    def _make_flush(self) -> Matrix:
        rows = (self._args.megabytes << 20) // type_info(TYPE_IDS["Q8_0"]).num_bytes(_COLS)
        return make_matrix(self._pool, "Q8_0", rows, _COLS, 1, self._rng)[0]

    def _make_layer(self, s: Shape, up_type: str, down_type: str) -> tuple[Matrix, Matrix, Matrix]:
        return (
            make_matrix(self._pool, up_type, s.width, s.hidden, s.experts, self._rng)[0],
            make_matrix(self._pool, up_type, s.width, s.hidden, s.experts, self._rng)[0],
            make_matrix(self._pool, down_type, s.hidden, s.width, s.experts, self._rng)[0],
        )

    def _layer_times(
        self,
        matrices: tuple[Matrix, Matrix, Matrix],
        small: tuple[Matrix, Matrix, Matrix],
        flush: Matrix,
        shape: Shape,
        draws: list[I32],
    ) -> list[float]:
        """Seconds of the runs.

        Before each run more is read than the caches hold, then a small layer runs: a model has
        gigabytes of other layers between two uses of an expert; without the flush a fifth of a
        layer was still in a socket's L3. But the layer before has just run the same code in the
        same buffers: without the small one, a layer of 120 us took 30 more to find its code.
        """
        tokens = len(draws[0])
        weights = np.full((tokens, shape.top_k), 1 / shape.top_k, np.float32)
        is_prompt = np.full(tokens, tokens >= PROMPT_ROWS, np.uint8)

        def bind(of: tuple[Matrix, Matrix, Matrix], ids: I32) -> Callable[[], None]:
            x = self._rng.standard_normal((tokens, of[0].cols), np.float32)
            out = np.empty((tokens, of[2].rows), np.float32)
            return bind_experts(of, x, ids, weights, out, is_prompt)

        calls = [bind(matrices, ids) for ids in draws]
        warm = bind(small, np.tile(np.arange(shape.top_k, dtype=np.int32), (tokens, 1)))
        ones = np.ones((1, flush.cols), np.float32)
        unused = np.empty((1, flush.rows), np.float32)

        def before() -> None:
            flush.multiply(ones, out=unused)
            warm()

        return best_time(lambda turn: calls[turn % len(calls)](), self._args.repeats, before)

    def _routes(self, tokens: int, shape: Shape) -> tuple[list[I32], int]:
        """Some draws that choose the same number of distinct experts, and that number.

        The number is the usual one, so the best time is not that of a lucky draw. One token's
        draws take turns at all experts: at random, some would come back while still cached.
        """
        if tokens == 1:
            order = self._rng.permutation(shape.experts).astype(np.int32)
            whole = shape.experts // shape.top_k * shape.top_k
            return list(order[:whole].reshape(-1, 1, shape.top_k)), shape.top_k
        keys = self._rng.random((256, tokens, shape.experts))
        draws = list(np.argsort(keys, axis=2)[:, :, : shape.top_k].astype(np.int32))
        counts = [len(np.unique(ids)) for ids in draws]
        usual = sorted(counts)[len(counts) // 2]
        return [ids for ids, n in zip(draws, counts, strict=True) if n == usual][:64], usual
