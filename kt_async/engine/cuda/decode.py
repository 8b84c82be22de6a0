"""Attention of decode steps by our own kernel (native/cuda/attention.cu): nothing is planned.

Lengths and page tables are read on the device, so that a captured graph serves any of them, and a
row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from kt_async.engine.cuda.args import DecodeStepArg, PartialsArg, RopeArg
from kt_async.engine.cuda.attention import Heads
from kt_async.engine.cuda.block import Block
from kt_async.engine.cuda.ops import CudaOps
from kt_async.engine.cuda.values import Rows, address, prepared_arg

# As in attention.cu.
_THREADS = 256
_BLOCKS_PER_PROCESSOR = 2
_HEAD_TILE = 8
_MAX_SPLITS = 32
_TILE_KEYS = 16
_HEAD_DIMS = (64, 128)

_F32 = ctypes.c_float
_PTR = ctypes.c_void_p


def is_served(heads: Heads, page_size: int) -> bool:
    """Whether the kernel takes these shapes and pages."""
    major, _ = torch.cuda.get_device_capability()
    is_bf16 = heads.kv_dtype == torch.bfloat16
    return major >= 8 and is_bf16 and heads.head_dim in _HEAD_DIMS and page_size % _TILE_KEYS == 0


@dataclass(slots=True)
class PagedDecode:
    """Implements ops.DecodeAttention for the rows of one block."""

    heads: Heads
    step: DecodeStepArg  # rows unset
    partials: PartialsArg
    buffers: tuple[torch.Tensor, ...]  # what partials points to
    processors: int

    @staticmethod
    def allocate(heads: Heads, block: Block, page_size: int, max_rows: int) -> PagedDecode:
        """Room for `max_rows` rows."""
        tiles = -(-heads.num_heads // heads.num_kv_heads // _HEAD_TILE)
        sets = max_rows * heads.num_kv_heads * tiles
        entries = sets * _MAX_SPLITS * _HEAD_TILE
        values = torch.empty(entries * heads.head_dim, dtype=torch.float32, device="cuda")
        scales = torch.empty(2 * entries, dtype=torch.float32, device="cuda")
        arrived = torch.zeros(sets, dtype=torch.int32, device="cuda")
        names = ("page_start", "last_page_len", "page_ids", "positions", "kv_slot")
        return PagedDecode(
            heads,
            DecodeStepArg(*(block.address(name) for name in names), 0, page_size),
            PartialsArg(values.data_ptr(), scales.data_ptr(), arrived.data_ptr()),
            (values, scales, arrived),
            torch.cuda.get_device_properties().multi_processor_count,
        )

    def __call__(
        self,
        ops: CudaOps,
        qkv: tuple[Rows, Rows, Rows],
        rope: RopeArg,
        cache: torch.Tensor,
        scale: float,
    ) -> Rows:
        q = qkv[0]
        out = ops.prepared(q.count, q.width, f32=True, q=True)
        step = DecodeStepArg.from_buffer_copy(self.step)
        step.rows = q.count
        tiles = -(-self.heads.num_heads // self.heads.num_kv_heads // _HEAD_TILE)
        most = q.count * self.heads.num_kv_heads * tiles * _MAX_SPLITS
        ops.launch(
            f"decode_attention_{self.heads.head_dim}",
            (min(most, self.processors * _BLOCKS_PER_PROCESSOR), 1),
            [
                *(_PTR(address(x.f32)) for x in qkv),
                step,
                rope,
                _F32(scale),
                _PTR(cache.data_ptr()),
                self.partials,
                prepared_arg(out),
            ],
            _THREADS,
        )
        return out
