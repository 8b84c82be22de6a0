"""Record a model's forward into a native program (the CPU's counterpart of a captured graph).

`ProgramRecorder` implements `model.ops.Ops` with symbolic values. `build` then decides which values
share a buffer, loads the weights in file order and hands everything to `ffi.model.CpuModel`. Runs
once at start-up; serving never comes here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kt_async.ffi import structs
from kt_async.model.ops import AttentionShape, Routing
from kt_async.model.spec import RopeSpec
from kt_async.weights.source import ModelFiles

Shape = tuple[int, ...]


@dataclass(eq=False, slots=True)
class Value:
    """One [rows, width] f32 result; rows is S when by_sample, else T."""

    width: int
    by_sample: bool = False
    buffer: int = -1


@dataclass(slots=True)
class Operation:
    """One native operation before its buffers are known."""

    code: int
    out: Value
    inputs: Sequence[Value | None]
    weights: Sequence[tuple[str, int] | None] = ()  # (tensor or constant name, KT_WEIGHT_x)
    ints: Sequence[int] = ()
    floats: Sequence[float] = ()
    in_place: Sequence[int] = ()  # inputs whose buffer the output may take over


@dataclass(slots=True)
class ProgramRecorder:
    """Ops that writes down what it is asked to do. tensors: name -> TensorInfo."""

    files: ModelFiles
    operations: list[Operation] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def has(self, weight: str) -> bool:
        return weight in self.files.tensors

    def embed(self, table: str) -> Value:
        out = Value(self._shape(table)[-1])
        return self._record(
            Operation(structs.KT_OP_EMBED, out, (), [(table, structs.KT_WEIGHT_BORROW)])
        )

    def rms_norm(self, x: Value, weight: str, eps: float) -> Value:
        out = Value(x.width, x.by_sample)
        weights = [(weight, structs.KT_WEIGHT_VECTOR)]
        return self._record(
            Operation(structs.KT_OP_RMSNORM, out, [x], weights, floats=[eps], ints=[0])
        )

    def linear(
        self, x: Value, weight: str, *, bias: str | None = None, residual: Value | None = None
    ) -> Value:
        shape = self._shape(weight)
        out = Value(shape[0] if len(shape) > 1 else 1, x.by_sample)
        weights = [(weight, structs.KT_WEIGHT_MATRIX), _vector(bias)]
        return self._record(
            Operation(structs.KT_OP_LINEAR, out, [x, residual], weights, in_place=[1])
        )

    def linears(
        self, x: Value, weights: Sequence[str], biases: Sequence[str | None] | None = None
    ) -> list[Value]:
        names = biases or [None] * len(weights)
        return [self.linear(x, w, bias=b) for w, b in zip(weights, names, strict=True)]

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
        frequencies, multiplier = rope_frequencies(shape.rope)
        self.constants["rope.frequencies"] = frequencies
        weights = [
            _vector(q_norm),
            _vector(k_norm),
            ("rope.frequencies", structs.KT_WEIGHT_VECTOR),
        ]
        ints = [
            shape.layer,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.rope.dim,
            int(shape.rope.neox),
        ]
        floats = [shape.eps, shape.scale, multiplier]
        out = Value(q.width)
        return self._record(
            Operation(structs.KT_OP_ATTENTION, out, [q, k, v], weights, ints, floats)
        )

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
        matrices = [(name, structs.KT_WEIGHT_MATRIX) for name in (gate, up, down)]
        ints = [
            routing.top_k,
            {"softmax": 0, "sigmoid": 1}[routing.scoring],
            int(routing.norm_topk),
            routing.groups,
            routing.groups_used,
            int(routing.group_sum_of_two),
        ]
        out = self._record(
            Operation(
                structs.KT_OP_MOE,
                Value(x.width),
                [x, residual],
                # Routers are multiplied in f32 whatever their type, so they are stored unpacked.
                [_vector(router), *matrices, _vector(routing.selection_bias)],
                ints,
                [routing.scale],
                in_place=[1],
            )
        )
        return out if beside is None else beside(out)

    def silu_mul(self, gate: Value, up: Value) -> Value:
        out = Value(gate.width, gate.by_sample)
        return self._record(Operation(structs.KT_OP_SILU_MUL, out, [gate, up], in_place=[0]))

    def add(self, a: Value, b: Value) -> Value:
        out = Value(a.width, a.by_sample)
        return self._record(Operation(structs.KT_OP_ADD, out, [a, b], in_place=[0]))

    def gate_add(self, residual: Value, gate: Value, x: Value) -> Value:
        out = Value(x.width, x.by_sample)
        return self._record(
            Operation(structs.KT_OP_GATE_ADD, out, [residual, gate, x], in_place=[0])
        )

    def last_rows(self, x: Value) -> Value:
        return self._record(Operation(structs.KT_OP_GATHER, Value(x.width, by_sample=True), [x]))

    def weight_uses(self) -> dict[tuple[str, int], None]:
        """Every (name, kind) in order of first use."""
        return {use: None for op in self.operations for use in op.weights if use is not None}

    def _shape(self, name: str) -> Shape:
        return self.files.tensors[name].shape

    def _record(self, operation: Operation) -> Value:
        self.operations.append(operation)
        return operation.out


def _vector(name: str | None) -> tuple[str, int] | None:
    return None if name is None else (name, structs.KT_WEIGHT_VECTOR)


def assign_buffers(
    operations: Sequence[Operation], result: Value, new_buffer: Callable[[int, bool], int]
) -> None:
    """Give every value a buffer; values that are never alive together share one.

    An output may overwrite an input only where the operation allows it and nobody reads that
    input later.
    """
    last_use = {id(v): i for i, op in enumerate(operations) for v in op.inputs if v is not None}
    last_use[id(result)] = len(operations)
    free: dict[tuple[int, bool], list[int]] = {}
    for index, op in enumerate(operations):
        dying = {id(v): v for v in op.inputs if v is not None and last_use[id(v)] == index}
        out = op.out
        for position in op.in_place:
            candidate = op.inputs[position]
            if candidate is not None and id(candidate) in dying and _same_rows(candidate, out):
                out.buffer = candidate.buffer
                del dying[id(candidate)]
                break
        else:
            pool = free.get((out.width, out.by_sample))
            out.buffer = pool.pop() if pool else new_buffer(out.width, out.by_sample)
        for value in dying.values():
            free.setdefault((value.width, value.by_sample), []).append(value.buffer)


def _same_rows(a: Value, b: Value) -> bool:
    return (a.width, a.by_sample) == (b.width, b.by_sample)


def rope_frequencies(rope: RopeSpec) -> tuple[np.ndarray, float]:
    """Inverse frequencies f32 [dim / 2] and the multiplier of cos and sin.

    Linear scaling divides every frequency; YaRN (arXiv 2309.00071, section 3.4) blends
    interpolated and original frequencies over a ramp between beta_fast and beta_slow rotations.
    """
    half = np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim
    inverse = 1.0 / (rope.theta**half)
    if rope.scaling == "linear":
        inverse = inverse / rope.factor
    if rope.scaling != "yarn":
        return inverse.astype(np.float32), 1.0

    def dimension(rotations: float) -> float:
        ratio = rope.original_context / (rotations * 2 * math.pi)
        return rope.dim * math.log(ratio) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), rope.dim - 1)
    ramp = np.clip((np.arange(rope.dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    blended = inverse / rope.factor * ramp + inverse * (1 - ramp)
    return blended.astype(np.float32), rope.attn_factor
