"""Routed experts in VRAM, straight from their quantised bands: few rows, or a prompt's."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kt_async.engine.cuda import gemv as cuda_gemv
from kt_async.engine.cuda.args import GroupsArg
from kt_async.engine.cuda.grouped import grouped_multiply
from kt_async.engine.cuda.ops import CudaOps
from kt_async.engine.cuda.values import ExpertSum, PackedMatrix, Rows
from kt_async.model.spec import ModelSpec

_I32 = ctypes.c_int32
_PTR = ctypes.c_void_p
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


def _group(ops: CudaOps, ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, cuda_gemv.Pairs]:
    """The pairs by expert, and the memory that holds them."""
    tokens, top_k = ids.shape
    if tokens == 1:
        return ids, cuda_gemv.Pairs(tokens, top_k, experts, ids.data_ptr())
    ready = ops.router.groups
    if ready is not None and ready.ids is ids:
        return ready.words, cuda_gemv.Pairs(tokens, top_k, experts, ids.data_ptr(), ready.arg)
    words = torch.empty(2 * (experts + 1) + ids.numel(), dtype=torch.int32, device="cuda")
    base = words.data_ptr()
    groups = GroupsArg(base, base + 4 * (experts + 1), base + 8 * (experts + 1))
    arguments = [_PTR(ids.data_ptr()), _I32(ids.numel()), _I32(experts), groups]
    ops.launch("group_pairs", (1, 1), arguments, _GROUP_THREADS)
    return words, cuda_gemv.Pairs(tokens, top_k, experts, ids.data_ptr(), groups)


def gemv(
    ops: CudaOps,
    x: Rows,
    residual: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    matrices: tuple[PackedMatrix, PackedMatrix, PackedMatrix],
) -> Rows:
    """Straight from the quantised bands, each expert read once for all its tokens: for few rows."""
    gate, up, down = matrices
    words, pairs = _group(ops, ids, gate.num_experts)
    hidden = cuda_gemv.gate_up(ops, ops.quantized(x), pairs, gate, up)
    partial = cuda_gemv.down(ops, hidden, pairs, down)
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
