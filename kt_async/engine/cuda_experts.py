"""Routed experts in VRAM: straight from their quantised bands, or dequantised grouped GEMMs."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kt_async.engine.cuda_args import GroupsArg
from kt_async.engine.cuda_ops import CudaOps
from kt_async.engine.cuda_values import ExpertSum, PackedMatrix, Rows
from kt_async.model.spec import ModelSpec

_I32 = ctypes.c_int32
_PTR = ctypes.c_void_p
_BLOCK = 256
_GROUP_THREADS = 1024
Names = tuple[str, str, str]  # gate, up, down


def moe_names(spec: ModelSpec) -> list[Names]:
    """(gate, up, down) tensor names of every MoE layer in order."""
    return [
        (
            f"blk.{i}.ffn_gate_exps.weight",
            f"blk.{i}.ffn_up_exps.weight",
            f"blk.{i}.ffn_down_exps.weight",
        )
        for i in range(spec.num_dense_layers, spec.num_layers)
    ]


def grouped_multiply(
    ops: CudaOps,
    x: Rows,
    residual: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    matrices: tuple[PackedMatrix, PackedMatrix, PackedMatrix],
) -> torch.Tensor:
    """All experts as dequantised bf16 grouped GEMMs: for many rows. No host synchronisation."""
    tokens, top_k = ids.shape
    gate, up, down = matrices
    flat = ids.reshape(-1).long()
    order = torch.argsort(flat, stable=True)
    counts = torch.zeros(gate.num_experts, dtype=torch.int64, device="cuda")
    counts.scatter_add_(0, flat, torch.ones_like(flat))  # bincount would wait for the GPU
    ends = torch.cumsum(counts, 0).to(torch.int32)
    rows = ops.as_bf16(x)[order // top_k]
    g = _grouped(rows, ops.dequantize(gate), ends)
    u = _grouped(rows, ops.dequantize(up), ends)
    h = (torch.nn.functional.silu(g.float()) * u.float()).to(torch.bfloat16)
    out = _grouped(h, ops.dequantize(down), ends).float()
    out *= weights.reshape(-1)[order].unsqueeze(1)
    # Back to (token, k) order before the sum: index_add_ would add in a varying order.
    unsorted = torch.empty_like(out)
    unsorted[order] = out
    return residual + unsorted.view(tokens, top_k, -1).sum(1)


def _grouped(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.grouped_mm(x, w.transpose(-2, -1), offs=ends)


def _group(ops: CudaOps, ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, GroupsArg]:
    """The pairs by expert, and the memory that holds them."""
    ready = ops.router.groups
    if ready is not None and ready.ids is ids:
        return ready.words, ready.arg
    pairs = ids.numel()
    words = torch.empty(2 * (experts + 1) + pairs, dtype=torch.int32, device="cuda")
    base = words.data_ptr()
    groups = GroupsArg(base, base + 4 * (experts + 1), base + 8 * (experts + 1))
    arguments = [_PTR(ids.data_ptr()), _I32(pairs), _I32(experts), groups]
    ops.launch("group_pairs", (1, 1), arguments, _GROUP_THREADS)
    return words, groups


def gemv(
    ops: CudaOps,
    x: Rows,
    residual: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    matrices: tuple[PackedMatrix, PackedMatrix, PackedMatrix],
) -> Rows:
    """Straight from the quantised bands, each expert read once for all its tokens: for few rows."""
    tokens, top_k = ids.shape
    pairs, experts = tokens * top_k, matrices[0].num_experts
    gate, up, down = matrices
    words, groups = _group(ops, ids, experts)
    most_active = min(pairs, experts)
    suffix = "1" if tokens == 1 else "2"  # rows per pass over an expert's weights
    hidden = torch.empty((pairs, gate.arg.rows), dtype=torch.float32, device="cuda")
    ops.launch(
        f"experts_gate_up_{suffix}",
        (gate.arg.num_bands, most_active),
        [
            gate.arg,
            up.arg,
            ops.quantized(x),
            groups,
            _I32(experts),
            _I32(top_k),
            _PTR(hidden.data_ptr()),
        ],
    )
    partial = torch.empty((pairs, down.arg.rows), dtype=torch.float32, device="cuda")
    ops.launch(
        f"experts_down_{suffix}",
        (down.arg.num_bands, most_active),
        [
            down.arg,
            ops.quantized(Rows(hidden, gate.arg.rows)),
            groups,
            _I32(experts),
            _PTR(partial.data_ptr()),
        ],
    )
    del words  # only now may its memory be used again: the launches above read it
    out = Rows(torch.empty_like(residual), down.arg.rows)
    out.sum_of = ExpertSum(partial, ids, weights, residual)
    return out


@dataclass(slots=True)
class VramExperts:
    """Every expert lies in VRAM."""

    weights: Mapping[str, PackedMatrix]

    def __call__(
        self,
        ops: CudaOps,
        x: Rows,
        residual: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        names: Names,
    ) -> torch.Tensor | Rows:
        gate, up, down = (self.weights[name] for name in names)
        if ops.few:
            return gemv(ops, x, residual, ids, weights, (gate, up, down))
        return grouped_multiply(ops, x, residual, ids, weights, (gate, up, down))
