"""Weights, activations and step metadata as the GPU engine holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from kt_async.engine.cuda.args import ActsArg, MatrixArg, PreparedArg

ACTS_GROUP = 8  # rows: kGroup of linear.cu
DENSE_ROWS = 256  # at least, of a product with dequantised weights: see CudaOps.multiply_prompts

# torch.cuda.current_stream() takes ten microseconds, which a prompt's layer would pay 20 times.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_raw_device = getattr(torch._C, "_cuda_getDevice", None)


def current_stream() -> int:
    """The current stream's cudaStream_t."""
    if _raw_stream is None or _raw_device is None:
        return int(torch.cuda.current_stream().cuda_stream)
    return int(_raw_stream(_raw_device()))


@dataclass(slots=True)
class PackedMatrix:
    """Quantised weights in VRAM: R16 bands as the CPU packs them."""

    data: torch.Tensor  # uint8
    arg: MatrixArg
    num_experts: int = 1


@dataclass(slots=True)
class FloatMatrix:
    """F32, F16 or BF16 weights in VRAM, row-major [rows, cols]."""

    data: torch.Tensor


Weight = PackedMatrix | FloatMatrix | torch.Tensor  # a tensor is an f32 vector


@dataclass(frozen=True, slots=True)
class NormOf:
    """A norm that was not launched yet: the kernel that needs its result may do it too."""

    x: Rows
    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class ExpertSum:
    """residual [T, H] + sum over k of weights[t, k] * partial[t * K + k]: not launched yet."""

    partial: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    residual: torch.Tensor


class WaitingSum(Protocol):
    """residual + the outputs of experts that somebody else computes: not waited for yet."""

    def add(self, out: torch.Tensor) -> None:
        """Wait on the current stream; the sum into out."""

    def add_and_norm(
        self, out: torch.Tensor, weight: torch.Tensor, eps: float, normed: Rows
    ) -> None:
        """The same, and the norm that follows."""


@dataclass(slots=True)
class Rows:
    """A [rows, width] value in the forms that somebody needed so far.

    norm_of, sum_of: what its forms will be once somebody launches it (CudaOps.settle).
    """

    f32: torch.Tensor | None
    width: int
    bf16: torch.Tensor | None = None
    q: torch.Tensor | None = None  # int8 [rows / 8, width / 32, 8, 32]: struct Acts of linear.cu
    meta: torch.Tensor | None = None  # f32 [rows / 8, width / 32, 2, 8]
    norm_of: NormOf | None = None
    sum_of: ExpertSum | WaitingSum | None = None

    @property
    def count(self) -> int:
        form = self.f32 if self.f32 is not None else self.bf16
        assert form is not None
        return int(form.shape[0])


@dataclass(slots=True)
class StepTensors:
    """Device views of the step's metadata, and how this step attends."""

    tokens: torch.Tensor  # int32 [T]
    positions: torch.Tensor  # int32 [T]
    kv_slot: torch.Tensor  # int32 [T]
    logit_tokens: torch.Tensor  # int64 [S] indices into T
    sampled: torch.Tensor  # int32 ids of the previous step's logit rows
    attend: Attend | None  # None: ops.decode_attention
    is_decode: bool = False  # every row is one token and has a logit row


class Attend(Protocol):
    """Paged attention of one layer over pages that already hold this step's keys."""

    def __call__(self, q: torch.Tensor, cache: torch.Tensor, scale: float) -> torch.Tensor:
        """q bf16 [T, QH, D] -> bf16 [T, QH, D]; scale: what q was not multiplied by yet."""


def address(tensor: torch.Tensor | None) -> int | None:
    """Device address; None stays None (a null pointer for the kernels)."""
    return None if tensor is None else tensor.data_ptr()


def acts_arg(rows: Rows) -> ActsArg:
    """The int8 form of rows for the kernels; null if there is none."""
    return ActsArg(address(rows.q), address(rows.meta), rows.width // 32)


def acts_room(
    rows: int, width: int, device: str | torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the int8 form of [rows, width], whose rows lie in groups: q and meta of Rows."""
    shape = (-(-rows // ACTS_GROUP), width // 32, ACTS_GROUP)
    q = torch.empty((*shape, 32), dtype=torch.int8, device=device)
    return q, torch.empty((*shape[:2], 2, ACTS_GROUP), dtype=torch.float32, device=device)


def dense_room(rows: int, *shape: int) -> torch.Tensor:
    """bf16 [rows, *shape], with memory behind it for DENSE_ROWS rows."""
    room = torch.empty((max(rows, DENSE_ROWS), *shape), dtype=torch.bfloat16, device="cuda")
    return room[:rows]


def enough_rows(x: torch.Tensor) -> torch.Tensor:
    """x [rows, width] and, below DENSE_ROWS, rows of whatever lies behind it, or zeros."""
    rows, width = x.shape
    if rows >= DENSE_ROWS:
        return x
    first, held = x.storage_offset(), x.untyped_storage().nbytes() // x.element_size()
    if x.is_contiguous() and held >= first + DENSE_ROWS * width:
        return x.as_strided((DENSE_ROWS, width), (width, 1), first)
    return torch.nn.functional.pad(x, (0, 0, 0, DENSE_ROWS - rows))


def prepared_arg(rows: Rows) -> PreparedArg:
    """Every form that rows has room for."""
    return PreparedArg(address(rows.f32), address(rows.bf16), acts_arg(rows))
