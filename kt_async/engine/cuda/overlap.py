"""The contract of experts that somebody else computes while the GPU goes on (handoff)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from kt_async.engine.cuda.args import SignalArg
from kt_async.engine.cuda.values import Rows

if TYPE_CHECKING:
    from kt_async.engine.cuda.ops import CudaOps


@runtime_checkable
class OverlappedExperts(Protocol):
    """Experts that are computed elsewhere while the GPU does work of its own."""

    def overlaps(self, names: tuple[str, str, str]) -> bool:
        """Whether it is so for this layer."""

    def ask(
        self,
        ops: CudaOps,
        x: Rows,
        ids: torch.Tensor,
        weights: torch.Tensor,
        names: tuple[str, str, str],
    ) -> None:
        """Hand the layer's rows over; returns at once."""

    def signal(self, names: tuple[str, str, str]) -> SignalArg:
        """Where a router kernel that asks by itself, instead of ask, puts the rows."""

    def take(self, ops: CudaOps, residual: torch.Tensor, names: tuple[str, str, str]) -> Rows:
        """residual + sum of the experts' outputs, f32 [T, H]; may still wait (Rows.sum_of)."""
