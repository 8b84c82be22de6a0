"""Routed experts of many rows: sorted by expert on the device, multiplied straight from their bands.

No host synchronisation, and no copy of a weight in another form (native/cuda/prompt_experts.cu). A
row's result does not depend on how many rows there are, and an expert that no row uses is not read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kt_async.engine.cuda.args import PromptTilesArg
from kt_async.engine.cuda.gemv import Launcher
from kt_async.engine.cuda.ops import CudaOps
from kt_async.engine.cuda.values import PackedMatrix, Rows, address

_I32 = ctypes.c_int32
_PTR = ctypes.c_void_p
_BLOCK = 256
_WARP = 32
# As in prompt_experts.cu.
_WARPS = 8
_STAGES = 2 * 64 * 128 * 2  # bytes of shared memory
# An expert's rows are the work of as many blocks for each of its bands. Measured on an H200.
_ROWS_OF_A_TURN = 32
_MOST_TURNS = 8
_SUM_BLOCK = 128  # threads of two columns each
Matrices = tuple[PackedMatrix, PackedMatrix, PackedMatrix]  # gate, up, down


@dataclass(frozen=True, slots=True)
class HostPart:
    """What the CPU computes of a layer; both tensors are pinned host memory."""

    gpu_computes: torch.Tensor  # uint8 [E]: 0 = the CPU
    out: torch.Tensor  # f32 [T, H]: the sum over the CPU's experts, where a token has any


@dataclass(slots=True)
class SortedRows:
    """The pairs of a step by expert. Device int32."""

    order: torch.Tensor  # [pairs] pair of each sorted row
    position: torch.Tensor  # [pairs] sorted row; negative: not on this GPU
    ends: torch.Tensor  # [E] one past the last row of an expert

    @property
    def num_rows(self) -> ctypes.c_void_p:
        """Address of the number of rows."""
        return _PTR(self.ends.data_ptr() + 4 * (len(self.ends) - 1))


def grouped_multiply(
    ops: CudaOps,
    x: Rows,
    residual: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    matrices: Matrices,
    host: HostPart | None = None,
) -> torch.Tensor:
    """residual + the experts' weighted sum, f32 [T, H]. host.out must be complete by now."""
    by_expert = sort_rows(ops, ids, matrices[0].num_experts, host)
    y = multiply_rows(ops, ops.as_bf16(x), by_expert, ids.shape[1], matrices)
    return sum_rows(ops, y, by_expert, weights, residual, host)


def sort_rows(
    ops: CudaOps, ids: torch.Tensor, num_experts: int, host: HostPart | None
) -> SortedRows:
    """Sort the pairs that the GPU computes. ids: int32 [T, K], below 0 = nobody's."""
    pairs = ids.numel()
    words = torch.empty(2 * pairs + num_experts, dtype=torch.int32, device="cuda")
    found = SortedRows(words[:pairs], words[pairs : 2 * pairs], words[2 * pairs :])
    arguments = [
        _PTR(ids.data_ptr()),
        _I32(pairs),
        _I32(num_experts),
        _PTR(None if host is None else host.gpu_computes.data_ptr()),
        _PTR(found.order.data_ptr()),
        _PTR(found.position.data_ptr()),
        _PTR(found.ends.data_ptr()),
    ]
    ops.launch("group_rows_by_expert", (num_experts, 1), arguments, _BLOCK)
    return found


def multiply_rows(
    ops: Launcher, x: torch.Tensor, by_expert: SortedRows, top_k: int, matrices: Matrices
) -> torch.Tensor:
    """down(silu(gate x) * up x) of every sorted row: bf16 [pairs, H]. x: bf16 [T, H]."""
    gate, up, down = matrices
    tiles = _tiles(x, by_expert, gate.num_experts)
    tiles.order, tiles.top_k = by_expert.order.data_ptr(), top_k
    hidden = _gate_up(ops, tiles, by_expert, gate, up)
    tiles = _tiles(hidden, by_expert, down.num_experts)
    return _products(ops, tiles, [down], len(hidden))


def _tiles(x: torch.Tensor, by_expert: SortedRows, experts: int) -> PromptTilesArg:
    """x: one row for each sorted row."""
    turns = len(by_expert.order) // (_ROWS_OF_A_TURN * experts)
    turns = min(_MOST_TURNS, max(1, turns))
    return PromptTilesArg(x.data_ptr(), None, 1, by_expert.ends.data_ptr(), turns)


def _gate_up(
    ops: Launcher,
    tiles: PromptTilesArg,
    by_expert: SortedRows,
    gate: PackedMatrix,
    up: PackedMatrix,
) -> torch.Tensor:
    """silu(gate x) * (up x) of every sorted row: bf16 [pairs, I]."""
    pairs, inner = len(by_expert.order), gate.arg.rows
    hidden = torch.empty((pairs, inner), dtype=torch.bfloat16, device=gate.data.device)
    if gate.arg.type == up.arg.type:
        grid = (-(-gate.arg.num_bands // _WARPS), gate.num_experts * tiles.turns)
        arguments = [gate.arg, up.arg, tiles, _PTR(hidden.data_ptr())]
        ops.launch("prompt_gate_up", grid, arguments, _WARP * _WARPS, _STAGES)
        return hidden
    both = _products(ops, tiles, [gate, up], pairs)
    arguments = [
        _PTR(both.data_ptr()),
        _I32(inner),
        by_expert.num_rows,
        _PTR(hidden.data_ptr()),
    ]
    ops.launch("silu_mul_rows", (pairs, 1), arguments, _BLOCK)
    return hidden


def _products(
    ops: Launcher, tiles: PromptTilesArg, matrices: Sequence[PackedMatrix], pairs: int
) -> torch.Tensor:
    """Every sorted row times matrices of its expert, side by side: bf16 [pairs, ...]."""
    stride = sum(m.arg.rows for m in matrices)
    out = torch.empty((pairs, stride), dtype=torch.bfloat16, device=matrices[0].data.device)
    column = 0
    for matrix in matrices:
        grid = (-(-matrix.arg.num_bands // (2 * _WARPS)), matrix.num_experts * tiles.turns)
        arguments = [matrix.arg, tiles, _I32(stride), _I32(column), _PTR(out.data_ptr())]
        ops.launch("prompt_products", grid, arguments, _WARP * _WARPS, _STAGES)
        column += matrix.arg.rows
    return out


def sum_rows(
    ops: CudaOps,
    y: torch.Tensor | None,
    by_expert: SortedRows,
    weights: torch.Tensor,
    residual: torch.Tensor,
    host: HostPart | None = None,
) -> torch.Tensor:
    """residual + each token's rows of y (None: no such rows) by its weights + the CPU's sum."""
    tokens, top_k = weights.shape
    cols = residual.shape[1]
    out = torch.empty_like(residual)
    ops.launch(
        "sum_rows",
        (tokens, -(-cols // (2 * _SUM_BLOCK))),
        [
            _PTR(address(y)),
            _PTR(by_expert.position.data_ptr()),
            _PTR(weights.data_ptr()),
            _I32(top_k),
            _I32(cols),
            _PTR(address(None if host is None else host.out)),
            _PTR(residual.data_ptr()),
            _PTR(out.data_ptr()),
        ],
        _SUM_BLOCK,
    )
    return out
