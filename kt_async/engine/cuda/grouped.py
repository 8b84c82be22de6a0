"""Routed experts of many rows: dequantised to bf16 and multiplied as grouped GEMMs on the GPU.

No host synchronisation: rows are sorted by expert on the device (native/cuda/prefill.cu), and an
expert that no row uses costs neither time nor reads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from kt_async.engine.cuda.ops import CudaOps
from kt_async.engine.cuda.values import PackedMatrix, Rows, address

_I32 = ctypes.c_int32
_I64 = ctypes.c_int64
_PTR = ctypes.c_void_p
_BLOCK = 256
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
    y = multiply_rows(ops, x, by_expert, ids.shape[1], matrices)
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
    ops: CudaOps, x: Rows, by_expert: SortedRows, top_k: int, matrices: Matrices
) -> torch.Tensor:
    """down(silu(gate x) * up x) of every sorted row: bf16 [pairs, H]."""
    gate, up, down = matrices
    pairs, inner, experts = len(by_expert.order), gate.arg.rows, gate.num_experts
    rows = _empty(pairs, x.width)
    source = ops.as_bf16(x)
    ops.launch(
        "gather_rows",
        (pairs, 1),
        [
            _PTR(source.data_ptr()),
            _I32(x.width),
            _I32(top_k),
            _PTR(by_expert.order.data_ptr()),
            by_expert.num_rows,
            _PTR(rows.data_ptr()),
        ],
        _BLOCK,
    )
    both = _empty(experts, 2 * inner, x.width)  # gate and up of an expert as one matrix
    _dequantize(ops, gate, by_expert, both, 0)
    _dequantize(ops, up, by_expert, both, inner * x.width)
    gated = _grouped(rows, both, by_expert)
    hidden = _empty(pairs, inner)
    ops.launch(
        "silu_mul_rows",
        (pairs, 1),
        [_PTR(gated.data_ptr()), _I32(inner), by_expert.num_rows, _PTR(hidden.data_ptr())],
        _BLOCK,
    )
    del both
    last = _empty(experts, down.arg.rows, inner)
    _dequantize(ops, down, by_expert, last, 0)
    return _grouped(hidden, last, by_expert)


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


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda")


def _dequantize(
    ops: CudaOps, matrix: PackedMatrix, by_expert: SortedRows, out: torch.Tensor, offset: int
) -> None:
    """Write the experts that have rows into out bf16 [E, ...], `offset` elements into each."""
    arguments = [
        matrix.arg,
        _PTR(by_expert.ends.data_ptr()),
        _I64(out.stride(0)),
        _PTR(out.data_ptr() + 2 * offset),
    ]
    ops.launch("dequantize_used", (matrix.arg.num_bands, matrix.num_experts), arguments, _BLOCK)


def _grouped(x: torch.Tensor, w: torch.Tensor, by_expert: SortedRows) -> torch.Tensor:
    return torch.nn.functional.grouped_mm(x, w.transpose(-2, -1), offs=by_expert.ends)
