"""KV pages in VRAM and, as a second tier, in pinned host memory.

The scheduler names pages; a plan lists which ones move between the tiers. All copies go onto the
step's stream in the order kt_sched_plan asks for: out, then in, then the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from kt_async.ffi import structs
from kt_async.model.spec import ModelSpec

FP8 = torch.float8_e4m3fn


@dataclass(slots=True)
class KvPages:
    """layers: per layer bf16 or e4m3 [pages + 1, 2, page, KH, D]; the last page is scratch.

    e4m3 holds keys and values as they are, scale 1: its range (448) is far beyond normed keys and
    values, its 4 significant bits round by at most 1 / 16.
    """

    layers: list[torch.Tensor]
    host: list[torch.Tensor] = field(default_factory=list)  # per layer, pinned, [host pages, ...]

    @staticmethod
    def allocate(
        spec: ModelSpec,
        page_size: int,
        num_pages: int,
        num_host_pages: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> KvPages:
        """Zeroed pages of both tiers."""
        page = (2, page_size, spec.num_kv_heads, spec.head_dim)
        layers = [
            torch.zeros((num_pages + 1, *page), dtype=dtype, device="cuda")
            for _ in range(spec.num_layers)
        ]
        host = [
            torch.zeros((num_host_pages, *page), dtype=dtype, pin_memory=True)
            for _ in range(spec.num_layers if num_host_pages else 0)
        ]
        return KvPages(layers, host)

    def move(
        self, plan: structs.Plan, layout: structs.BlockLayout, block: npt.NDArray[np.uint8]
    ) -> None:
        """Put the plan's copies onto the current stream; returns at once."""
        for page, host_page in _pairs(block, layout.copies_out, plan.num_copies_out):
            for device, host in zip(self.layers, self.host, strict=True):
                host[host_page].copy_(device[page], non_blocking=True)
        for page, host_page in _pairs(block, layout.copies_in, plan.num_copies_in):
            for device, host in zip(self.layers, self.host, strict=True):
                device[page].copy_(host[host_page], non_blocking=True)


def _pairs(block: npt.NDArray[np.uint8], start: int, count: int) -> list[list[int]]:
    pairs: list[list[int]] = block[start : start + 8 * count].view(np.int32).reshape(-1, 2).tolist()
    return pairs
