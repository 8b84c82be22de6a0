"""Launches of the kernels that multiply packed weights with few rows (native/cuda/linear.cu).

The order in which a row's products are added depends on the matrix alone, never on the number of
rows: its result is the same whatever runs beside it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kt_async.engine.cuda.args import ActsArg, CutArg, GroupsArg, MatrixArg, OutputsArg
from kt_async.engine.cuda.values import PackedMatrix, acts_room, address
from kt_async.ffi.cuda import KernelArgument

MAX_ROWS = 16  # of one launch, whole groups of rows
_KERNEL_ROWS = (1, 8, 16)  # multiply_x_r takes up to x rows
_PASS_ROWS = 8  # kPass of linear.cu
_WARP = 32
_BAND = 16  # rows
_TILE = 256  # columns
_BLOCK = 32
_META_BYTES = 8  # of a row's block, see Acts in linear.cu
_COLUMN = 20  # floats of a row of partial sums: kColumn of linear.cu
_MAX_STAGES = 2
_STAGE_BUDGET = 72 << 10  # bytes of shared memory for a block's stages
_BLOCK_WARPS = 4
_MOST_PARTS = 16
_LEAST_PARTS = 8
_WARPS_WANTED = 2048  # of a launch
_EXPERT_PARTS = 2
_DEQUANTIZE_WARPS = 8
_Q6_K = 14
_RESIDENT_WARPS = 16  # of a multiprocessor: the kernels take at most 128 registers
_BANDS_FOR_PAIRS = 256
_TURNS = 2  # runs whose sums a block holds
_SHARED_BUDGET = 95 << 10  # bytes of a block: what GPUs since compute capability 8.6 have
_BLOCKS_WITHOUT_GPU = 2

# Bytes of a tile of 256 columns in shared memory; Q6_K: and its d.
_TILE_BYTES = {
    2: 2304,
    3: 2560,
    6: 2816,
    7: 3072,
    8: 4352,
    12: 2304,
    13: 2816,
    14: 3328 + 32,
    20: 2304,
    23: 2176,
    39: 2176,
}

_I32 = ctypes.c_int32
_PTR = ctypes.c_void_p


class Launcher(Protocol):
    """What is needed of CudaOps."""

    def launch(
        self,
        name: str,
        grid: tuple[int, int],
        arguments: Sequence[KernelArgument],
        block: int = ...,
        shared_bytes: int = ...,
    ) -> None:
        """A kernel on the current stream."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a launch is cut. parts alone decides in which order products are added."""

    parts: int  # sums of a band, a power of two
    split: int  # warps that share a run of bands, divides parts
    teams: int  # of split warps in a block
    run: int  # bands that a team does together: 1 or 2
    sums: int  # bands whose sums a block holds
    stages: int  # tiles in flight for each warp
    stage_bytes: int  # of a band

    @property
    def threads(self) -> int:
        """Of a block."""
        return _WARP * self.split * self.teams

    def arg(self, columns: int) -> CutArg:
        """For a kernel whose passes take up to `columns` rows."""
        return CutArg(
            self.parts, self.split, self.stages, self.stage_bytes, _part_floats(columns), self.sums
        )

    def shared_bytes(self, columns: int) -> int:
        """Of a block: sums of parts and stages."""
        sums = 4 * self.parts * _part_floats(columns) * self.sums
        return sums + self.split * self.teams * self.stages * self.run * self.stage_bytes


def _part_floats(columns: int) -> int:
    return columns * _COLUMN


def _parts_and_bytes(matrices: Sequence[MatrixArg], parts: int) -> tuple[int, int]:
    """Parts of a band where `parts` are wanted, and the bytes of a tile."""
    tiles = -(-matrices[0].cols // _TILE)
    return min(_floor_power(tiles), parts), max(_TILE_BYTES[m.type] for m in matrices)


def _experts_cut(matrices: Sequence[MatrixArg], most_split: int, bands: int | None) -> Cut:
    """For experts' matrices with the same input. bands: of a block, None: what suits."""
    parts, stage_bytes = _parts_and_bytes(matrices, _EXPERT_PARTS)
    split = min(parts, most_split)
    teams = bands or _BLOCK_WARPS // split
    tiles = -(-matrices[0].cols // _TILE)
    stages = 1 if bands is None else min(_MAX_STAGES, -(-tiles // split))
    while stages > 1 and split * teams * stages * stage_bytes > _STAGE_BUDGET:
        stages -= 1
    return Cut(parts, split, teams, 1, teams, stages, stage_bytes)


def _dense_cut(matrices: Sequence[MatrixArg], columns: int) -> Cut:
    """Few bands are split between more warps, so that the memory of a large GPU is busy; of small
    tiles a warp does two bands at a time, which share what it reads of the activations, and of
    large ones it asks for two tiles. Measured on an H200.

    columns: rows that the kernel takes at once.
    """
    bands = sum(m.num_bands for m in matrices)
    wanted = max(_LEAST_PARTS, min(_MOST_PARTS, _floor_power(_WARPS_WANTED // bands)))
    parts, stage_bytes = _parts_and_bytes(matrices, wanted)
    pairs = bands >= _BANDS_FOR_PAIRS and stage_bytes != _TILE_BYTES[_Q6_K]
    run, stages = (2, 1) if pairs else (1, _MAX_STAGES)
    cuts = (
        Cut(parts, split, 1, r, _TURNS * r, n, stage_bytes)
        for split, r, n in ((parts, run, stages), (parts, 1, 2), (parts, 1, 1), (parts // 2, 1, 1))
    )
    return next(c for c in cuts if c.shared_bytes(columns) <= _SHARED_BUDGET)


def _most_blocks(matrix: PackedMatrix, cut: Cut) -> int:
    """Blocks that run at once."""
    device = matrix.data.device
    if device.type != "cuda":
        return _BLOCKS_WITHOUT_GPU
    return max(1, _RESIDENT_WARPS // cut.split) * _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _floor_power(number: int) -> int:
    """The largest power of two up to `number`; at least 1."""
    return 1 << max(0, number.bit_length() - 1)


def multiply(
    ops: Launcher,
    acts: ActsArg,
    rows: int,
    matrices: Sequence[PackedMatrix],
    biases: Sequence[torch.Tensor | None],
    residual: torch.Tensor | None,
) -> list[torch.Tensor]:
    """f32 [rows, m.rows] for up to three matrices of the same input, each read once per 16 rows.

    residual: f32, added to the first product.
    """
    outs = [_empty(m, rows, m.arg.rows) for m in matrices]
    for first in range(0, rows, MAX_ROWS):
        count = min(MAX_ROWS, rows - first)
        columns = next(n for n in _KERNEL_ROWS if n >= count)
        arg = OutputsArg()
        for i, (matrix, bias, out) in enumerate(zip(matrices, biases, outs, strict=True)):
            arg.w[i] = matrix.arg
            arg.out[i] = out[first:].data_ptr()
            arg.bias[i] = address(bias)
        arg.residual = None if residual is None else residual[first:].data_ptr()
        cut = _dense_cut([m.arg for m in matrices], columns)
        runs = sum(-(-m.arg.num_bands // cut.run) for m in matrices)
        ops.launch(
            f"multiply_{columns}_{cut.run}",
            (min(runs, _most_blocks(matrices[0], cut)), 1),
            [arg, acts_from(acts, first), _I32(count), cut.arg(columns)],
            cut.threads,
            cut.shared_bytes(columns),
        )
    return outs


def _empty(beside: PackedMatrix, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=beside.data.device)


def acts_from(acts: ActsArg, first: int) -> ActsArg:
    """The rows from `first` on, a whole number of groups."""
    skipped = first * acts.blocks
    return ActsArg(acts.q + _BLOCK * skipped, acts.meta + _META_BYTES * skipped, acts.blocks)


@dataclass(frozen=True, slots=True)
class Pairs:
    """The (token, expert) pairs of a step: by expert, or (one token) in the router's order."""

    tokens: int
    top_k: int
    experts: int
    ids: int  # address of int32 [tokens, top_k]
    groups: GroupsArg | None = None  # None: one token

    @property
    def count(self) -> int:
        """Of pairs."""
        return self.tokens * self.top_k

    @property
    def most_active(self) -> int:
        """Experts that can have pairs."""
        return min(self.count, self.experts)

    @property
    def most_split(self) -> int:
        """Of a band: one token has few bands to read."""
        return _EXPERT_PARTS if self.groups is None else 1

    def kernel(self, name: str) -> tuple[str, list[KernelArgument], int]:
        """Kernel, its arguments that name the pairs, columns of a pass."""
        if self.groups is None:
            return f"{name}_1", [_PTR(self.ids)], 1
        return f"{name}_n", [self.groups, _I32(self.experts)], _PASS_ROWS


@dataclass(slots=True)
class Hidden:
    """silu(gate x) * (up x), quantised; rows are pairs in the order of the groups."""

    q: torch.Tensor  # int8 [pairs / 8, I / 32, 8, 32]
    meta: torch.Tensor  # f32 [pairs / 8, I / 32, 2, 8], see Acts in linear.cu

    def arg(self) -> ActsArg:
        """For a kernel."""
        return ActsArg(self.q.data_ptr(), self.meta.data_ptr(), self.q.shape[1])


def gate_up(
    ops: Launcher, acts: ActsArg, pairs: Pairs, gate: PackedMatrix, up: PackedMatrix
) -> Hidden:
    """The first half of the routed experts; acts: the tokens' rows."""
    width = gate.arg.rows
    hidden = Hidden(*acts_room(pairs.count, width, gate.data.device))
    cut = _experts_cut([gate.arg, up.arg], pairs.most_split, 4)  # two neighbouring bands of each
    name, which, columns = pairs.kernel("experts_gate_up")
    top_k = [] if pairs.groups is None else [_I32(pairs.top_k)]
    ops.launch(
        name,
        (width // (2 * _BAND), pairs.most_active),
        [gate.arg, up.arg, acts, *which, *top_k, cut.arg(columns), hidden.arg()],
        cut.threads,
        cut.shared_bytes(columns),
    )
    return hidden


def down(ops: Launcher, hidden: Hidden, pairs: Pairs, matrix: PackedMatrix) -> torch.Tensor:
    """f32 [pairs, H], not weighted."""
    out = _empty(matrix, pairs.count, matrix.arg.rows)
    cut = _experts_cut([matrix.arg], pairs.most_split, None)
    name, which, columns = pairs.kernel("experts_down")
    ops.launch(
        name,
        (-(-matrix.arg.num_bands // cut.teams), pairs.most_active),
        [matrix.arg, hidden.arg(), *which, cut.arg(columns), _PTR(out.data_ptr())],
        cut.threads,
        cut.shared_bytes(columns),
    )
    return out


def dequantize(ops: Launcher, matrix: PackedMatrix, out: torch.Tensor) -> None:
    """Fill out, bf16 [experts, rows, cols] or of that many values."""
    grid = (matrix.arg.num_bands, matrix.num_experts)
    ops.launch("dequantize", grid, [matrix.arg, _PTR(out.data_ptr())], _WARP * _DEQUANTIZE_WARPS)
