"""Routed experts in VRAM: straight from their quantised bands, or dequantised grouped GEMMs."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kt_async.engine.cuda_args import GroupsArg
from kt_async.engine.cuda_grouped import grouped_multiply
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
