"""Ops on the GPU: our kernels over packed weights, flashinfer attention, torch for the rest.

Everything is launched on torch's current stream with no host synchronisation, so that the same
code runs eagerly and under CUDA-graph capture. Hidden states are f32. Rows of decode steps multiply
quantised weights with int8 activations, in kernels whose results for a row do not depend on the
rows beside it; prompt rows use tensor cores, with dense weights dequantised to bf16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kt_async.engine.cpu_program import rope_frequencies
from kt_async.engine.cuda import gemv as cuda_gemv
from kt_async.engine.cuda.args import ActsArg, RopeArg
from kt_async.engine.cuda.attention import exact_scale
from kt_async.engine.cuda.kv import FP8, KvPages
from kt_async.engine.cuda.overlap import OverlappedExperts
from kt_async.engine.cuda.router import Router, add_experts, add_experts_and_norm
from kt_async.engine.cuda.values import (
    ExpertSum,
    FloatMatrix,
    NormOf,
    PackedMatrix,
    Rows,
    StepTensors,
    Weight,
    acts_arg,
    acts_room,
    address,
    current_stream,
    dense_room,
    enough_rows,
    prepared_arg,
)
from kt_async.ffi.cuda import KernelArgument, Kernels
from kt_async.model.ops import AttentionShape, Routing

_THREADS = 256
_WARP = 32
_MAX_GROUP = 3  # matrices of one launch

_I32 = ctypes.c_int32
_I64 = ctypes.c_int64
_F32 = ctypes.c_float
_PTR = ctypes.c_void_p


def _row_stride(x: Rows) -> int:
    """Values from one row of the f32 form to the next."""
    assert x.f32 is not None
    return int(x.f32.stride(0))


class RoutedExperts(Protocol):
    """Who computes the routed experts of a layer (VRAM, CPU, or both)."""

    def __call__(
        self,
        ops: CudaOps,
        x: Rows,
        residual: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        names: tuple[str, str, str],
    ) -> torch.Tensor | Rows:
        """residual + sum of the experts' outputs, f32 [T, H]."""


class DecodeAttention(Protocol):
    """Attention of a decode step, from the products of q, k and v to the output's input."""

    def __call__(
        self,
        ops: CudaOps,
        qkv: tuple[Rows, Rows, Rows],
        rope: RopeArg,
        cache: torch.Tensor,
        scale: float,
    ) -> Rows:
        """Also stores the new keys and values. Rows of width heads * D."""


@dataclass(slots=True)
class CudaOps:
    """Implements model.ops.Ops eagerly. step is set before each forward.

    few: the rows at hand go to the kernels for few rows (decode steps, logit rows).
    """

    kernels: Kernels
    weights: Mapping[str, Weight]
    pages: KvPages
    page_size: int
    experts_backend: RoutedExperts
    decode_attention: DecodeAttention | None = None
    step: StepTensors | None = None
    few: bool = False
    router: Router = field(default_factory=Router)
    # Of all prompts, beside decode steps or alone: torch keeps freed memory by stream.
    prompt_stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)
    _frequencies: dict[int, tuple[torch.Tensor, float]] = field(default_factory=dict)

    def has(self, weight: str) -> bool:
        return weight in self.weights

    # ---- Ops

    def embed(self, table: str) -> Rows:
        step = self._step()
        self.few = step.is_decode
        weight = self.weights[table]
        if isinstance(weight, FloatMatrix):
            ids = torch.where(
                step.tokens >= 0, step.tokens, step.sampled[(-1 - step.tokens).clamp(min=0).long()]
            )
            x = weight.data[ids.long()].float()
            return Rows(x, x.shape[1])
        assert isinstance(weight, PackedMatrix)
        cols = weight.arg.cols
        x = self._empty(len(step.tokens), cols)
        self._launch(
            "embed",
            (len(step.tokens), 1),
            64,
            [
                weight.arg,
                _PTR(step.tokens.data_ptr()),
                _PTR(step.sampled.data_ptr()),
                _PTR(x.data_ptr()),
            ],
        )
        return Rows(x, cols)

    def rms_norm(self, x: Rows, weight: str, eps: float) -> Rows:
        out = self.prepared(x.count, x.width, f32=True)
        vector = self._tensor(weight)
        if x.sum_of is not None:
            assert x.f32 is not None
            if isinstance(x.sum_of, ExpertSum):
                add_experts_and_norm(self, x.sum_of, x.f32, vector, eps, out)
            else:
                x.sum_of.add_and_norm(x.f32, vector, eps, out)
            x.sum_of = None
            return out
        out.norm_of = NormOf(x, vector, eps)
        if not self.few:
            self.settle(out)
        return out

    def settle(self, x: Rows) -> None:
        """Launch what x still waits for."""
        if x.sum_of is not None:
            assert x.f32 is not None
            if isinstance(x.sum_of, ExpertSum):
                add_experts(self, x.sum_of, x.f32)
            else:
                x.sum_of.add(x.f32)
            x.sum_of = None
        norm, x.norm_of = x.norm_of, None
        if norm is not None:
            self.settle(norm.x)
            self._launch(
                "rms_norm",
                (x.count, 1),
                min(1024, max(_WARP, x.width // 2 // _WARP * _WARP)),
                [
                    _PTR(address(norm.x.f32)),
                    _PTR(norm.weight.data_ptr()),
                    _F32(norm.eps),
                    _I32(x.width),
                    prepared_arg(x),
                ],
            )

    def linear(
        self, x: Rows, weight: str, *, bias: str | None = None, residual: Rows | None = None
    ) -> Rows:
        self.settle(x)
        if residual is not None:
            self.settle(residual)
        matrix = self.weights[weight]
        bias_vector = None if bias is None else self._tensor(bias)
        added = None if residual is None else residual.f32
        if isinstance(matrix, PackedMatrix) and self.few:
            return self._gemv(x, [matrix], [bias_vector], added)[0]
        dense = self._dense(matrix)
        out = self._multiply_dense(x, dense)
        if bias_vector is not None:
            out += bias_vector
        if added is not None:
            out += added
        return Rows(out, dense.shape[0])

    def linears(
        self, x: Rows, weights: Sequence[str], biases: Sequence[str | None] | None = None
    ) -> list[Rows]:
        self.settle(x)
        names = biases or [None] * len(weights)
        matrices = [self.weights[w] for w in weights]
        packed = [m for m in matrices if isinstance(m, PackedMatrix)]
        if len(packed) < len(matrices) or len(packed) > _MAX_GROUP:
            return [self.linear(x, w, bias=b) for w, b in zip(weights, names, strict=True)]
        vectors = [None if b is None else self._tensor(b) for b in names]
        if self.few:
            return self._gemv(x, packed, vectors, None)
        return self._multiply_side_by_side(x, packed, vectors)

    def attention(
        self,
        q: Rows,
        k: Rows,
        v: Rows,
        shape: AttentionShape,
        *,
        q_norm: str | None = None,
        k_norm: str | None = None,
    ) -> Rows:
        step = self._step()
        rows, d = q.count, shape.head_dim
        frequencies, multiplier = self._rope(shape)
        cache = self.pages.layers[shape.layer]
        arg = RopeArg(
            frequencies.data_ptr(),
            self._vector(q_norm),
            self._vector(k_norm),
            shape.eps,
            multiplier,
            shape.num_heads,
            shape.num_kv_heads,
            d,
            shape.rope.dim,
            int(shape.rope.neox),
            int(cache.dtype == FP8),
        )
        if step.attend is None:
            assert self.decode_attention is not None
            return self.decode_attention(self, (q, k, v), arg, cache, shape.scale)
        q_out = torch.empty((rows, shape.num_heads, d), dtype=torch.bfloat16, device="cuda")
        scale = exact_scale(shape.scale)
        self._launch(
            "attention_inputs",
            (rows, shape.num_heads + 2 * shape.num_kv_heads),
            _WARP,
            [
                _PTR(address(q.f32)),
                _PTR(address(k.f32)),
                _PTR(address(v.f32)),
                *(_I64(_row_stride(x)) for x in (q, k, v)),
                _PTR(step.positions.data_ptr()),
                _PTR(step.kv_slot.data_ptr()),
                arg,
                _F32(shape.scale / scale),
                _I32(self.page_size),
                _PTR(q_out.data_ptr()),
                _PTR(cache.data_ptr()),
            ],
            4 * d,
        )
        out = step.attend(q_out, cache, scale)
        return Rows(None, q.width, bf16=out.view(rows, q.width))

    def experts(
        self,
        x: Rows,
        residual: Rows | None,
        routing: Routing,
        *,
        router: str,
        gate: str,
        up: str,
        down: str,
        beside: Callable[[Rows], Rows] | None = None,
    ) -> Rows:
        name = routing.selection_bias
        bias = None if name is None else self._tensor(name)
        matrix = self._tensor(router).view(-1, x.width)
        backend, names = self.experts_backend, (gate, up, down)
        elsewhere = None
        if isinstance(backend, OverlappedExperts) and backend.overlaps(names):
            elsewhere = backend
        signal = None
        if elsewhere is not None and self.router.is_fused(self, matrix):
            signal = elsewhere.signal(names)
        ids, weights = self.router(self, x, matrix, routing, bias, signal)
        if residual is None:
            residual = Rows(torch.zeros((x.count, x.width), device="cuda"), x.width)
        self.settle(residual)
        assert residual.f32 is not None
        if elsewhere is None:
            made = backend(self, x, residual.f32, ids, weights, names)
            out = made if isinstance(made, Rows) else Rows(made, x.width)
            return out if beside is None else beside(out)
        if signal is None:
            elsewhere.ask(self, x, ids, weights, names)
        if beside is not None:
            residual = beside(residual)
        assert residual.f32 is not None
        return elsewhere.take(self, residual.f32, names)

    def silu_mul(self, gate: Rows, up: Rows) -> Rows:
        out = self.prepared(gate.count, gate.width, f32=True)
        self._launch(
            "silu_mul",
            (gate.count, -(-gate.width // 1024)),
            min(1024, gate.width),
            [
                _PTR(address(gate.f32)),
                _PTR(address(up.f32)),
                _I32(gate.width),
                prepared_arg(out),
            ],
        )
        return out

    def add(self, a: Rows, b: Rows) -> Rows:
        self.settle(a)
        self.settle(b)
        assert a.f32 is not None
        assert b.f32 is not None
        return Rows(a.f32 + b.f32, a.width)

    def gate_add(self, residual: Rows, gate: Rows, x: Rows) -> Rows:
        self.settle(residual)
        assert residual.f32 is not None
        assert gate.f32 is not None
        assert x.f32 is not None
        return Rows(residual.f32 + torch.sigmoid(gate.f32[:, :1]) * x.f32, x.width)

    def last_rows(self, x: Rows) -> Rows:
        assert x.f32 is not None
        step = self._step()
        if step.is_decode:
            return x
        self.settle(x)
        self.few = True  # at most max_batch_size and those of prompts, 32
        return Rows(x.f32[step.logit_tokens], x.width)

    # ---- pieces that expert backends use too

    def quantized(self, x: Rows) -> ActsArg:
        """The int8 form of x, made when it is missing."""
        if x.q is None:
            made = self.prepared(x.count, x.width, f32=False, q=True)
            self._prepare(x, made)
            x.q, x.meta = made.q, made.meta
        return acts_arg(x)

    def as_bf16(self, x: Rows) -> torch.Tensor:
        """The bf16 form of x."""
        if x.bf16 is None:
            assert x.f32 is not None
            x.bf16 = x.f32.to(torch.bfloat16)
        return x.bf16

    def multiply_prompts(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x @ weight^T. Few rows are padded: cuBLAS then adds every row up in one order.

        Below some hundred rows it splits the columns of some shapes between blocks; tests/gpu
        checks that prompts give the same text alone and together.
        """
        return torch.nn.functional.linear(enough_rows(x), weight)[: len(x)]

    def dequantize(self, matrix: PackedMatrix, out: torch.Tensor | None = None) -> torch.Tensor:
        """bf16 [experts, rows, cols]."""
        shape = (matrix.num_experts, matrix.arg.rows, matrix.arg.cols)
        if out is None:
            out = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        cuda_gemv.dequantize(self, matrix, out)
        return out

    # ---- internals

    def _gemv(
        self,
        x: Rows,
        matrices: Sequence[PackedMatrix],
        biases: Sequence[torch.Tensor | None],
        residual: torch.Tensor | None,
    ) -> list[Rows]:
        """Up to three matrices in one launch; residual is added to the first."""
        acts = self.quantized(x)
        outs = cuda_gemv.multiply(self, acts, x.count, matrices, biases, residual)
        return [Rows(out, out.shape[1]) for out in outs]

    def _multiply_side_by_side(
        self,
        x: Rows,
        matrices: Sequence[PackedMatrix],
        biases: Sequence[torch.Tensor | None],
    ) -> list[Rows]:
        """x times each matrix, in one product; the results are columns of one tensor."""
        widths = [m.arg.rows for m in matrices]
        shape = (sum(widths), matrices[0].arg.cols)
        dense = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        for matrix, part in zip(matrices, dense.split(widths), strict=True):
            cuda_gemv.dequantize(self, matrix, part)
        parts = self._multiply_dense(x, dense).split(widths, dim=1)
        for part, bias in zip(parts, biases, strict=True):
            if bias is not None:
                part.add_(bias)
        return [Rows(part, width) for part, width in zip(parts, widths, strict=True)]

    def _dense(self, matrix: Weight) -> torch.Tensor:
        if isinstance(matrix, FloatMatrix):
            return matrix.data
        assert isinstance(matrix, PackedMatrix)
        return self.dequantize(matrix)[0]

    def _multiply_dense(self, x: Rows, dense: torch.Tensor) -> torch.Tensor:
        """x @ dense^T as f32, in the weights' own precision."""
        if dense.dtype == torch.float32:
            source = x.f32 if x.f32 is not None else self.as_bf16(x).float()
        else:
            source = self.as_bf16(x).to(dense.dtype)
        return self.multiply_prompts(source, dense).float()

    def prepared(self, rows: int, width: int, *, f32: bool, q: bool | None = None) -> Rows:
        """Room for a value; the int8 form when few rows will want it."""
        small = self.few if q is None else q
        out = Rows(self._empty(rows, width) if f32 else None, width)
        if small:
            out.q, out.meta = acts_room(rows, width, "cuda")
        elif f32:
            out.bf16 = dense_room(rows, width)
        return out

    def _prepare(self, x: Rows, out: Rows) -> None:
        from_f32 = x.f32 is not None
        self._launch(
            "prepare",
            (x.count, -(-x.width // 1024)),
            min(1024, x.width),
            [
                _PTR(address(x.f32)),
                _PTR(None if from_f32 else address(x.bf16)),
                _I32(x.width),
                prepared_arg(out),
            ],
        )

    def _rope(self, shape: AttentionShape) -> tuple[torch.Tensor, float]:
        found = self._frequencies.get(shape.rope.dim)
        if found is None:
            frequencies, multiplier = rope_frequencies(shape.rope)
            found = torch.from_numpy(frequencies).cuda(), multiplier
            self._frequencies[shape.rope.dim] = found
        return found

    def _tensor(self, name: str) -> torch.Tensor:
        vector = self.weights[name]
        assert isinstance(vector, torch.Tensor)
        return vector

    def _vector(self, name: str | None) -> int | None:
        return None if name is None else self._tensor(name).data_ptr()

    def _step(self) -> StepTensors:
        assert self.step is not None
        return self.step

    def _empty(self, rows: int, cols: int) -> torch.Tensor:
        return torch.empty((rows, cols), dtype=torch.float32, device="cuda")

    def _launch(
        self,
        name: str,
        grid: tuple[int, int],
        block: int,
        arguments: Sequence[KernelArgument],
        shared_bytes: int = 0,
    ) -> None:
        self.kernels.launch(name, grid, block, current_stream(), arguments, shared_bytes)

    def launch(
        self,
        name: str,
        grid: tuple[int, int],
        arguments: Sequence[KernelArgument],
        block: int = _THREADS,
        shared_bytes: int = 0,
    ) -> None:
        """A kernel on the current stream."""
        self._launch(name, grid, block, arguments, shared_bytes)
