"""From hidden states to experts on the GPU: one launch for decode rows, torch and a kernel for
prompts.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from kt_async.engine.cuda.args import (
    GroupsArg,
    RouterInputArg,
    RouterOutputArg,
    RoutingArg,
    SignalArg,
)
from kt_async.engine.cuda.values import ExpertSum, Rows, address, prepared_arg
from kt_async.model.ops import Routing

if TYPE_CHECKING:
    from kt_async.engine.cuda.ops import CudaOps

# As in router.cu.
_THREADS = 256
_MAX_EXPERTS = 1024
_MAX_PAIRS = 1024
_PRODUCT_ROWS, _PRODUCT_EXPERTS = 64, 32

_WARP = 32
_SUM_THREADS = 1024
_I32 = ctypes.c_int32
_F32 = ctypes.c_float
_PTR = ctypes.c_void_p


@dataclass(slots=True)
class Groups:
    """The pairs of `ids` by expert; words holds them."""

    ids: torch.Tensor
    words: torch.Tensor
    arg: GroupsArg

    @staticmethod
    def room(ids: torch.Tensor, experts: int) -> Groups:
        """Not filled yet."""
        words = torch.empty(2 * (experts + 1) + ids.numel(), dtype=torch.int32, device="cuda")
        base = words.data_ptr()
        arg = GroupsArg(base, base + 4 * (experts + 1), base + 8 * (experts + 1))
        return Groups(ids, words, arg)


@dataclass(slots=True)
class Router:
    """Scores tokens and picks their experts. groups: of the last decode rows, if made."""

    groups: Groups | None = None
    _arrived: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def is_fused(self, ops: CudaOps, weight: torch.Tensor) -> bool:
        """Whether one kernel does everything."""
        return ops.few and len(weight) <= _MAX_EXPERTS

    def __call__(
        self,
        ops: CudaOps,
        x: Rows,
        weight: torch.Tensor,
        routing: Routing,
        selection_bias: torch.Tensor | None,
        signal: SignalArg | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int32 [T, K] and weights f32 [T, K]; x may be a norm that still waits.

        signal: the rows, ids and weights go there too (only where is_fused).
        """
        rows, experts = x.count, len(weight)
        ids = torch.empty((rows, routing.top_k), dtype=torch.int32, device="cuda")
        weights = torch.empty((rows, routing.top_k), dtype=torch.float32, device="cuda")
        self.groups = None
        arg = _routing_arg(routing, experts, selection_bias)
        if self.is_fused(ops, weight):
            made = RouterOutputArg(
                ids=ids.data_ptr(), weights=weights.data_ptr(), signal=signal or SignalArg()
            )
            # The experts of one token all differ: nobody asks for its groups.
            if signal is None and rows > 1 and ids.numel() <= _MAX_PAIRS:
                self.groups = Groups.room(ids, experts)
                made.groups = self.groups.arg
            self._few(ops, x, weight, arg, made)
        else:
            ops.settle(x)
            assert x.f32 is not None
            logits = _product(ops, x.f32, weight)
            arguments = [
                _PTR(logits.data_ptr()),
                arg,
                _PTR(ids.data_ptr()),
                _PTR(weights.data_ptr()),
            ]
            ops.launch("route", (rows, 1), arguments, _THREADS)
        return ids, weights

    def _few(
        self,
        ops: CudaOps,
        x: Rows,
        weight: torch.Tensor,
        routing: RoutingArg,
        made: RouterOutputArg,
    ) -> None:
        rows, (experts, cols) = x.count, weight.shape
        if len(self._arrived) <= rows:
            self._arrived = torch.zeros(max(64, rows) + 1, dtype=torch.int32, device="cuda")
        norm = x.norm_of
        source = x if norm is None else norm.x
        logits = torch.empty((rows, experts), dtype=torch.float32, device="cuda")
        given = RouterInputArg(
            address(source.f32),
            None if norm is None else norm.weight.data_ptr(),
            0.0 if norm is None else norm.eps,
            cols,
            weight.data_ptr(),
            prepared_arg(x),
        )
        made.logits, made.arrived = logits.data_ptr(), self._arrived.data_ptr()
        grid = (-(-experts // (_THREADS // _WARP)), rows)
        ops.launch("router", grid, [given, routing, made], _THREADS, 4 * cols)
        x.norm_of = None


def _product(ops: CudaOps, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight^T in f32 for many rows."""
    rows, (experts, cols) = len(x), weight.shape
    logits = torch.empty((rows, experts), dtype=torch.float32, device="cuda")
    arguments = [
        _PTR(x.data_ptr()),
        _PTR(weight.data_ptr()),
        _I32(rows),
        _I32(cols),
        _I32(experts),
        _PTR(logits.data_ptr()),
    ]
    grid = (-(-experts // _PRODUCT_EXPERTS), -(-rows // _PRODUCT_ROWS))
    ops.launch("router_product", grid, arguments, _THREADS)
    return logits


def _routing_arg(routing: Routing, experts: int, selection_bias: torch.Tensor | None) -> RoutingArg:
    return RoutingArg(
        experts,
        routing.top_k,
        int(routing.scoring == "sigmoid"),
        int(routing.norm_topk),
        routing.groups,
        routing.groups_used,
        int(routing.group_sum_of_two),
        routing.scale,
        address(selection_bias),
    )


def add_experts(ops: CudaOps, value: ExpertSum, out: torch.Tensor) -> None:
    """out = residual + the weighted outputs."""
    rows, cols = out.shape
    arguments = [
        _PTR(value.partial.data_ptr()),
        _PTR(value.ids.data_ptr()),
        _PTR(value.weights.data_ptr()),
        _I32(value.ids.shape[1]),
        _I32(cols),
        _PTR(value.residual.data_ptr()),
        _PTR(out.data_ptr()),
    ]
    ops.launch("experts_sum", (rows, -(-cols // _THREADS)), arguments, _THREADS)


def add_experts_and_norm(
    ops: CudaOps, value: ExpertSum, out: torch.Tensor, norm: torch.Tensor, eps: float, normed: Rows
) -> None:
    """The same, and the norm that follows."""
    rows, cols = out.shape
    arguments = [
        _PTR(value.partial.data_ptr()),
        _PTR(value.ids.data_ptr()),
        _PTR(value.weights.data_ptr()),
        _I32(value.ids.shape[1]),
        _I32(cols),
        _PTR(value.residual.data_ptr()),
        _PTR(out.data_ptr()),
        _PTR(norm.data_ptr()),
        _F32(eps),
        prepared_arg(normed),
    ]
    threads = min(_SUM_THREADS, -(-cols // _WARP) * _WARP)
    ops.launch("experts_sum_norm", (rows, 1), arguments, threads, 4 * cols)
