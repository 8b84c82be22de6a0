"""Packed weights on the GPU, launches of the kernels that read them, and checks of their results.

Used by bench/cuda_kernels.py and tests/gpu/test_kernels.py. Results are compared with gguf's
decoder and with the same row alone, which must be equal to the last bit.
"""

from __future__ import annotations

import ctypes
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, quants

from kt_async.engine.cuda import gemv as cuda_gemv
from kt_async.engine.cuda.args import ActsArg, GroupsArg, MatrixArg
from kt_async.engine.cuda.grouped import SortedRows, multiply_rows
from kt_async.engine.cuda.values import ACTS_GROUP, PackedMatrix
from kt_async.errors import KtError
from kt_async.ffi.cuda import KernelArgument, Kernels, compile_kernels, kernel_source
from kt_async.ffi.handoff import packed_matrix
from kt_async.ffi.matrix import Matrix, type_info
from kt_async.ffi.pool import Pool
from kt_async.model.synthetic import random_blocks
from kt_async.weights.gguf_header import TYPE_IDS

TOLERANCE = 1e-5  # of a product's norm: sums in f32
_BF16_TOLERANCE = 6e-3  # hidden rows and results are rounded to bf16


@dataclass(frozen=True)
class Shape:
    """A routed-expert layer: hidden size, expert width, number of experts, experts per token."""

    hidden: int
    width: int
    experts: int
    top_k: int


def compile_types(types: Iterable[int]) -> bytes:
    """The kernels for ggml types, for the GPU at hand; several threads may do so at once."""
    major, minor = torch.cuda.get_device_capability()
    architecture = f"sm_{major}{minor}{'a' if major >= 9 else ''}"
    cache = Path(tempfile.gettempdir()) / "kt_async-cubins"
    return compile_kernels(kernel_source(sorted(types)), architecture, cache)


class Launcher:
    """Launches on torch's current stream, as CudaOps does."""

    def __init__(self, cubin: bytes) -> None:
        torch.empty(1, device="cuda")  # torch makes the context that the kernels are loaded into
        self._kernels = Kernels(cubin)

    def launch(
        self,
        name: str,
        grid: tuple[int, int],
        arguments: Sequence[KernelArgument],
        block: int = 256,
        shared_bytes: int = 0,
    ) -> None:
        """A kernel on the current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        self._kernels.launch(name, grid, block, stream, arguments, shared_bytes)


@dataclass(frozen=True)
class Weights:
    """A matrix, or one for each expert, as GGUF bytes and as bands in VRAM."""

    type: str
    raw: npt.NDArray[np.uint8]
    matrix: PackedMatrix

    def copies(self, count: int) -> list[PackedMatrix]:
        """The same bands at `count` places."""
        places = self.matrix.data.repeat(count).view(count, -1)
        made = []
        for place in places:
            arg = MatrixArg.from_buffer_copy(self.matrix.arg)
            arg.data = place.data_ptr()
            made.append(PackedMatrix(place, arg, self.matrix.num_experts))
        return made


def make_weights(
    pool: Pool,
    name: str,
    rows: int,
    cols: int,
    experts: int,
    rng: np.random.Generator,
    device: str = "cuda",
) -> Weights:
    """Random weights: about 4 MiB drawn, repeated with an odd period."""
    info = type_info(TYPE_IDS[name])
    blocks = experts * rows * cols // info.block_size
    drawn = min(blocks, (4 << 20) // info.block_bytes | 1)
    raw = np.resize(random_blocks(name, drawn, 0.05, rng), (blocks, info.block_bytes)).reshape(-1)
    with Matrix(pool, TYPE_IDS[name], raw, rows, cols, experts) as packed:
        part = packed_matrix(packed.handle)
        data = torch.from_numpy(part.data.copy()).to(device).view(-1)
    bands = -(-rows // 16)
    arg = MatrixArg(
        data.data_ptr(), part.band_bytes, bands * part.band_bytes, part.type, rows, cols, bands
    )
    return Weights(name, raw, PackedMatrix(data, arg, experts))


@dataclass(frozen=True)
class Acts:
    """int8 activations of M rows as the kernels read them: struct Acts of linear.cu."""

    q: torch.Tensor  # int8 [M / 8, cols / 32, 8, 32]
    meta: torch.Tensor  # f32 [M / 8, cols / 32, 2, 8]
    rows: int

    def arg(self) -> ActsArg:
        """For a kernel."""
        return ActsArg(self.q.data_ptr(), self.meta.data_ptr(), self.q.shape[1])

    def scales(self) -> torch.Tensor:
        """f64 [M, cols]: what one step of q is worth."""
        return self._by_row(0).repeat_interleave(32, dim=1)

    def sums(self) -> torch.Tensor:
        """f64 [M, cols / 32]: of a block's values."""
        return self._by_row(1)

    def values(self) -> torch.Tensor:
        """f64 [M, cols]."""
        return self._rows_of(self.q).reshape(self.rows, -1) * self.scales()

    def _by_row(self, which: int) -> torch.Tensor:
        return self._rows_of(self.meta[:, :, which])

    def _rows_of(self, grouped: torch.Tensor) -> torch.Tensor:
        """f64, and nothing of the last group's rows that are not there: nobody wrote them."""
        row = torch.arange(self.rows, device=grouped.device)
        return grouped[row // ACTS_GROUP, :, row % ACTS_GROUP].double()


def quantize(x: torch.Tensor) -> Acts:
    """As the step's kernels do, by torch. x: f32 [M, cols]."""
    rows, cols = x.shape
    padded = torch.nn.functional.pad(x, (0, 0, 0, -rows % ACTS_GROUP))
    blocks = padded.view(-1, ACTS_GROUP, cols // 32, 32).transpose(1, 2)
    largest = blocks.abs().amax(3)
    q = (blocks * torch.where(largest > 0, 127 / largest, 0)[..., None]).round()
    scale = largest / 127
    meta = torch.stack([scale, scale * q.sum(3)], 2)
    return Acts(q.to(torch.int8).contiguous(), meta.contiguous(), rows)


def group_pairs(ops: cuda_gemv.Launcher, ids: torch.Tensor, experts: int) -> cuda_gemv.Pairs:
    """The pairs of int32 ids [T, K]; its memory lives as long as the result's `groups.memory`."""
    tokens, top_k = ids.shape
    if tokens == 1:
        return cuda_gemv.Pairs(tokens, top_k, experts, ids.data_ptr())
    size = 2 * (experts + 1) + ids.numel()
    words = torch.empty(size, dtype=torch.int32, device=ids.device)
    base = words.data_ptr()
    groups = GroupsArg(base, base + 4 * (experts + 1), base + 8 * (experts + 1))
    groups.memory = words
    arguments = [
        ctypes.c_void_p(ids.data_ptr()),
        ctypes.c_int32(ids.numel()),
        ctypes.c_int32(experts),
        groups,
    ]
    ops.launch("group_pairs", (1, 1), arguments, 1024)
    return cuda_gemv.Pairs(tokens, top_k, experts, ids.data_ptr(), groups)


def draw_ids(
    tokens: int, shape: Shape, rng: np.random.Generator, device: str = "cuda"
) -> torch.Tensor:
    """int32 [tokens, top_k], uniform, different within a token."""
    keys = rng.random((tokens, shape.experts))
    ids = np.argsort(keys, axis=1)[:, : shape.top_k].astype(np.int32)
    return torch.from_numpy(np.ascontiguousarray(ids)).to(device)


def time_graph(runs: Sequence[Callable[[], object]], repeats: int = 7) -> float:
    """Median seconds of one run, all of them back to back in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in runs[:2]:
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            keep = [run() for run in runs]
        times: list[float] = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3)
    del keep
    return statistics.median(times) / len(runs)


def reference(weights: Weights, expert: int, rows: slice) -> torch.Tensor:
    """f64 [rows, cols] by gguf's decoder."""
    info = type_info(TYPE_IDS[weights.type])
    arg = weights.matrix.arg
    row_bytes = info.num_bytes(arg.cols)
    first = (expert * arg.rows + rows.start) * row_bytes
    raw = weights.raw[first : first + (rows.stop - rows.start) * row_bytes]
    values = quants.dequantize(raw, GGMLQuantizationType[weights.type])
    dense = torch.from_numpy(values.reshape(-1, arg.cols))
    return dense.to(weights.matrix.data.device).double()


def expect(what: str, got: torch.Tensor, exact: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Raises KtError when a product is wrong."""
    error = float((got.double() - exact).norm() / exact.norm())
    if not error < tolerance:
        raise KtError(f"{what}: the product is wrong by {error:.1e}")


def check_linear(ops: cuda_gemv.Launcher, weights: Weights, x: torch.Tensor) -> None:
    """A product with the rows of x against gguf and against its rows alone."""
    arg, count = weights.matrix.arg, len(x)
    acts = quantize(x)
    out = cuda_gemv.multiply(ops, acts.arg(), count, [weights.matrix], [None], None)[0]
    what = f"{weights.type} [{arg.rows}, {arg.cols}] x {count}"
    for rows in (slice(0, min(256, arg.rows)), slice(max(0, arg.rows - 256), arg.rows)):
        exact = acts.values() @ reference(weights, 0, rows).T
        expect(what, out[:, rows], exact)
    for i in range(count):
        one = quantize(x[i : i + 1])
        alone = cuda_gemv.multiply(ops, one.arg(), 1, [weights.matrix], [None], None)[0]
        if not torch.equal(alone[0], out[i]):
            raise KtError(f"{what}: row {i} differs from the same row alone")


def check_experts(
    ops: cuda_gemv.Launcher,
    layer: tuple[Weights, Weights, Weights],
    x: torch.Tensor,
    ids: torch.Tensor,
) -> None:
    """Some pairs of a layer against gguf, and every token against the token alone."""
    gate, up, down = layer
    acts, top_k = quantize(x), ids.shape[1]
    one_token = len(x) == 1  # whose pairs stay in the router's order
    order = torch.arange(top_k) if one_token else ids.view(-1).argsort(stable=True)
    pairs = group_pairs(ops, ids, gate.matrix.num_experts)
    hidden = cuda_gemv.gate_up(ops, acts.arg(), pairs, gate.matrix, up.matrix)
    out = cuda_gemv.down(ops, hidden, pairs, down.matrix)
    place = order.argsort().tolist()  # of a pair in hidden
    what = f"experts {gate.type}/{down.type}, {len(x)} tokens"
    for pair in range(0, ids.numel(), max(1, ids.numel() // 4)):
        expert = int(ids.view(-1)[pair])
        row = acts.values()[pair // top_k]
        gated = reference(gate, expert, slice(0, gate.matrix.arg.rows)) @ row
        value = reference(up, expert, slice(0, up.matrix.arg.rows)) @ row
        exact = quantize((torch.nn.functional.silu(gated) * value).float()[None]).values()[0]
        made = Acts(hidden.q, hidden.meta, ids.numel())
        got, step = made.values()[place[pair]], made.scales()[place[pair]]
        if not bool(((got - exact).abs() <= 1.01 * step).all()):  # a tie may round the other way
            raise KtError(f"{what}: pair {pair} is wrong after gate and up")
        expect(what, out[pair], reference(down, expert, slice(0, down.matrix.arg.rows)) @ got)
    for token in range(len(x)):
        one, some = quantize(x[token : token + 1]), ids[token : token + 1].contiguous()
        alone = group_pairs(ops, some, gate.matrix.num_experts)
        h = cuda_gemv.gate_up(ops, one.arg(), alone, gate.matrix, up.matrix)
        mine = slice(token * top_k, (token + 1) * top_k)
        if not torch.equal(cuda_gemv.down(ops, h, alone, down.matrix), out[mine]):
            raise KtError(f"{what}: token {token} differs from the same token alone")


def sort_pairs(ids: torch.Tensor, experts: int) -> SortedRows:
    """As group_rows_by_expert does, by torch; ids below 0 are nobody's."""
    flat = ids.view(-1)
    mine = flat >= 0
    order = torch.where(mine, flat, experts).argsort(stable=True)
    position = order.argsort().int()
    ends = torch.bincount(flat[mine], minlength=experts).cumsum(0).int()
    return SortedRows(order.int(), torch.where(mine, position, -1).int(), ends)


def check_prompt_experts(
    ops: cuda_gemv.Launcher,
    layer: tuple[Weights, Weights, Weights],
    x: torch.Tensor,
    ids: torch.Tensor,
) -> None:
    """Some pairs of bf16 rows against gguf, and some tokens against the token alone."""
    gate, up, down = layer
    matrices = (gate.matrix, up.matrix, down.matrix)
    experts, top_k = gate.matrix.num_experts, ids.shape[1]
    by_expert = sort_pairs(ids, experts)
    out = multiply_rows(ops, x, by_expert, top_k, matrices)
    what = f"prompt experts {gate.type}/{up.type}/{down.type}, {len(x)} tokens"
    for pair in range(0, ids.numel(), max(1, ids.numel() // 6)):
        expert = int(ids.view(-1)[pair])
        if expert < 0:
            continue
        row = x[pair // top_k].double()
        gated, value, last = (
            reference(w, expert, slice(0, w.matrix.arg.rows)).float().bfloat16().double()
            for w in (gate, up, down)
        )
        hidden = torch.nn.functional.silu(gated @ row) * (value @ row)
        expect(what, out[by_expert.position[pair]], last @ hidden, _BF16_TOLERANCE)
    for token in range(0, len(x), max(1, len(x) // 2)):
        one, some = x[token : token + 1].contiguous(), ids[token : token + 1].contiguous()
        alone = sort_pairs(some, experts)
        made = multiply_rows(ops, one, alone, top_k, matrices)
        for k, pair in enumerate(range(token * top_k, (token + 1) * top_k)):
            mine, its = by_expert.position[pair], alone.position[k]
            if its >= 0 and not torch.equal(made[its], out[mine]):
                raise KtError(f"{what}: token {token} differs from the same token alone")
