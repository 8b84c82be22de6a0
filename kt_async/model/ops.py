"""The operations a model family is written in.

A family's `forward(ops, spec)` reads top to bottom and never touches devices: the CPU engine
records it once into a native program (`engine.cpu_program`), a GPU engine executes it eagerly or
captures it. Weights are named as in the GGUF file. `Value` is whatever the engine hands out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from kt_async.model.spec import RopeSpec

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Grouped-query attention of one layer."""

    layer: int  # index of the layer's KV pages
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    scale: float
    rope: RopeSpec


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router picks and weighs its experts."""

    top_k: int
    scoring: str  # softmax | sigmoid
    norm_topk: bool
    scale: float = 1.0
    groups: int = 0
    groups_used: int = 0
    group_sum_of_two: bool = False  # DeepSeek V3 scores a group by its two best experts
    selection_bias: str | None = None  # weight added to the scores for choosing, not for weighing


class Ops(Protocol[Value]):
    """Shapes: T tokens of the step, S logit rows, H hidden size, N output features."""

    def has(self, weight: str) -> bool:
        """Whether the file holds this tensor."""

    def embed(self, table: str) -> Value:
        """Rows of the embedding table for the step's tokens: [T, H]."""

    def rms_norm(self, x: Value, weight: str, eps: float) -> Value:
        """Root-mean-square norm over the last axis, times weight."""

    def linear(
        self, x: Value, weight: str, *, bias: str | None = None, residual: Value | None = None
    ) -> Value:
        """x @ W^T (+ bias) (+ residual): [T, N]."""

    def linears(
        self, x: Value, weights: Sequence[str], biases: Sequence[str | None] | None = None
    ) -> list[Value]:
        """Up to three linear layers of one input, which a GPU runs in one launch."""

    def attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        shape: AttentionShape,
        *,
        q_norm: str | None = None,
        k_norm: str | None = None,
    ) -> Value:
        """Norm and rotate q and k, append k and v to the pages, attend causally: [T, heads * D]."""

    def experts(
        self,
        x: Value,
        residual: Value | None,
        routing: Routing,
        *,
        router: str,
        gate: str,
        up: str,
        down: str,
        beside: Callable[[Value], Value] | None = None,
    ) -> Value:
        """residual + the weighted outputs of each token's top_k experts: [T, H].

        beside: the layer's own work that does not need them (a shared expert), as a function of
        what it is added to; it runs while somebody else computes the experts, else after them.
        """

    def silu_mul(self, gate: Value, up: Value) -> Value:
        """silu(gate) * up."""

    def add(self, a: Value, b: Value) -> Value:
        """a + b."""

    def gate_add(self, residual: Value, gate: Value, x: Value) -> Value:
        """residual + sigmoid(gate) * x with one gate per row."""

    def last_rows(self, x: Value) -> Value:
        """The rows whose logits the step needs: [S, H]."""
