"""The step's metadata block on host and device, and typed views of both."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from kt_async.engine.cuda.args import PiecesArg
from kt_async.engine.cuda.attention import StepPages
from kt_async.ffi import structs
from kt_async.ffi.cuda import Kernels

SAMPLE_DTYPE = np.dtype(structs.SampleParams)
_LOAD_BLOCKS = 4  # thread blocks of one array


class Block:
    """The step block on host (pinned) and device, and typed views of both."""

    def __init__(self, layout: structs.BlockLayout) -> None:
        self.layout = layout
        self.host = torch.zeros(layout.num_bytes, dtype=torch.uint8, pin_memory=True)
        self.device = torch.zeros(layout.num_bytes, dtype=torch.uint8, device="cuda")
        self.array: npt.NDArray[np.uint8] = self.host.numpy()
        self.samples = self.array[
            layout.samples : layout.samples + layout.max_samples * SAMPLE_DTYPE.itemsize
        ].view(SAMPLE_DTYPE)

    def host_ints(self, name: str, count: int) -> torch.Tensor:
        """int32 view of an array of the pinned block."""
        start = getattr(self.layout, name)
        return self.host[start : start + 4 * count].view(torch.int32)

    def ints(self, name: str, count: int) -> torch.Tensor:
        """The same on the device."""
        start = getattr(self.layout, name)
        return self.device[start : start + 4 * count].view(torch.int32)

    def address(self, name: str) -> int:
        """Device address of an array."""
        return int(self.device.data_ptr()) + int(getattr(self.layout, name))

    def pages(self, first: int, end: int, *, on_host: bool) -> StepPages:
        """What a planner needs for rows [first, end); on_host: page ids too."""
        row_start = self.host_ints("row_start", end + 1)[first:]
        page_start = self.host_ints("page_start", end + 1)[first:]
        begin, stop = int(page_start[0]), int(page_start[-1])
        page_ids = self.host_ints if on_host else self.ints
        return StepPages(
            row_start=row_start - row_start[0] if first else row_start,
            page_start=page_start - begin if first else page_start,
            last_page_len=self.host_ints("last_page_len", end)[first:],
            page_ids=page_ids("page_ids", stop)[begin:],
        )

    def fill_idle(
        self, first: int, rows: int, scratch: int, page_size: int, page_ids: int = 0
    ) -> int:
        """Make rows [first, rows) attend one position of the scratch page and sample greedily.

        page_ids: how many are in use before; returns how many are after.
        """
        idle = rows - first
        if idle == 0:
            return page_ids
        for name in ("tokens", "positions"):
            self._numbers(name, rows)[first:] = 0
        self._numbers("kv_slot", rows)[first:] = scratch * page_size
        self._numbers("last_page_len", rows)[first:] = 1
        after = page_ids + idle
        self._numbers("page_start", rows + 1)[first:] = np.arange(page_ids, after + 1)
        self._numbers("page_ids", after)[page_ids:] = scratch
        params = self.samples[first:rows]
        params[:] = np.zeros(1, SAMPLE_DTYPE)
        params["target"] = -1
        params["num_logprobs"] = -1
        params["mask_row"] = -1
        params["token_index"] = np.arange(first, rows)
        return after

    def load(
        self,
        kernels: Kernels,
        stream: torch.cuda.Stream,
        rows: int,
        num_page_ids: int,
        plan: structs.Plan,
    ) -> None:
        """Bring what a decode step of `rows` rows reads to the device, without the copy engine."""
        sizes = dict.fromkeys(("tokens", "positions", "kv_slot", "last_page_len"), rows)
        sizes |= {
            "page_start": rows + 1,
            "page_ids": num_page_ids,
            "samples": rows * SAMPLE_DTYPE.itemsize // 4,
        }
        if plan.num_bias:
            sizes |= dict.fromkeys(("bias_ids", "bias_values"), plan.num_bias)
        if plan.num_history:
            sizes |= dict.fromkeys(("history_ids", "history_counts"), plan.num_history)
        pieces = PiecesArg()
        for i, (name, count) in enumerate(sizes.items()):
            pieces.start[i], pieces.count[i] = getattr(self.layout, name) // 4, count
        addresses = [ctypes.c_void_p(t.data_ptr()) for t in (self.host, self.device)]
        grid = (len(sizes), _LOAD_BLOCKS)
        kernels.launch("load_block", grid, 256, stream.cuda_stream, [*addresses, pieces])

    def first_page(self, row: int) -> int:
        """Where the page ids of a row begin."""
        return int(self._numbers("page_start", row + 1)[row])

    def _numbers(self, name: str, count: int) -> npt.NDArray[np.int32]:
        start = getattr(self.layout, name)
        return self.array[start : start + 4 * count].view(np.int32)
