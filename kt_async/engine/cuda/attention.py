"""Paged attention for the GPU engine: flashinfer where it is installed, torch otherwise.

A planner is told the step's shape on the host before the forward and returns the `attend` callable
of `ops`. Page tables come from the scheduler's block: host views in pinned memory for
planning, device views for the kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from kt_async.engine.cuda.values import Attend, dense_room

_DECODE_SCRATCH = 128 << 20  # bytes
_PROMPT_SCRATCH = 16 << 20  # whole caches leave nothing to merge
_LARGE_TILE_MEAN = 64


def exact_scale(scale: float) -> float:
    """What is left of `scale` for attention to multiply scores by; queries got the rest before.

    flashinfer multiplies by scale * log2(e). As a power of two that is exact, and the keys of a tile
    that a query does not see, as many as its chunk happens to have, leave its result as it is: with
    any other factor they turn it by a rounding error (exp2(m * s - round(m * s)), not 1).
    """
    return 2.0 ** round(math.log2(scale * math.log2(math.e))) / math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of grouped-query attention, and the type its pages hold."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # of scores; planned is its exact_scale
    kv_dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True, slots=True)
class StepPages:
    """Which pages the rows of a step use; int32. host: pinned CPU tensors, page_ids on the GPU."""

    row_start: torch.Tensor  # [R + 1] host
    page_start: torch.Tensor  # [R + 1] host
    last_page_len: torch.Tensor  # [R] host
    page_ids: torch.Tensor  # [sum] device


class Planner(Protocol):
    """Plans one kind of step outside of any graph."""

    def plan(self, pages: StepPages) -> Attend: ...


def make_decode_planner(
    heads: Heads, page_size: int, rows: int, max_page_ids: int, scratch: torch.Tensor
) -> FlashDecode | None:
    """A graph-safe planner for exactly `rows` decode rows; None without flashinfer.

    scratch: from make_scratch; planners whose graphs never run at the same time share one.
    """
    flashinfer = import_flashinfer()
    return (
        None
        if flashinfer is None
        else FlashDecode(flashinfer, heads, page_size, rows, max_page_ids, scratch)
    )


def make_scratch(num_bytes: int = _DECODE_SCRATCH) -> torch.Tensor:
    """Zeroed device memory in which flashinfer keeps partial results during a run."""
    return torch.zeros(num_bytes, dtype=torch.uint8, device="cuda")


def make_prefill_planner(heads: Heads, page_size: int) -> Planner:
    """A planner for prefill and mixed steps, run eagerly."""
    flashinfer = import_flashinfer()
    if flashinfer is None:
        return TorchAttention(page_size)
    return FlashPrefill(flashinfer, heads, page_size)


def plan_made_up(planner: Planner, cache: torch.Tensor, tokens: int) -> Attend:
    """For a prompt of so many tokens that are not in the cache: all its pages are the last one.

    cache: [pages, 2, page_size, KV heads, D].
    """
    page_size = cache.shape[2]
    pages = -(-tokens // page_size)
    return planner.plan(
        StepPages(
            row_start=torch.tensor([0, tokens], dtype=torch.int32),
            page_start=torch.tensor([0, pages], dtype=torch.int32),
            last_page_len=torch.tensor([tokens - (pages - 1) * page_size], dtype=torch.int32),
            page_ids=torch.full((pages,), len(cache) - 1, dtype=torch.int32, device="cuda"),
        )
    )


def load_kernels(planner: Planner, num_heads: int, cache: torch.Tensor) -> None:
    """Attend once on the current stream: the first prompt need not load kernels."""
    page_size, d = cache.shape[2], cache.shape[4]
    q = torch.zeros((page_size, num_heads, d), dtype=torch.bfloat16, device="cuda")
    plan_made_up(planner, cache, page_size)(q, cache, d**-0.5)


def import_flashinfer() -> Any:
    """The module, or None where it is not installed."""
    try:
        import flashinfer  # noqa: PLC0415 - optional, and slow to import
    except ImportError:
        return None
    return flashinfer


class FlashDecode:
    """flashinfer's batched decode with tensor cores; its buffers have fixed addresses."""

    def __init__(
        self,
        flashinfer: Any,
        heads: Heads,
        page_size: int,
        rows: int,
        max_page_ids: int,
        scratch: torch.Tensor,
    ) -> None:
        def buffer(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device="cuda")

        self._heads, self._page_size = heads, page_size
        self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            scratch,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=buffer(rows + 1),
            paged_kv_indices_buffer=buffer(max_page_ids),
            paged_kv_last_page_len_buffer=buffer(rows),
        )

    def plan(self, pages: StepPages) -> Attend:
        heads = self._heads
        self._wrapper.plan(
            pages.page_start,
            pages.page_ids,
            pages.last_page_len,
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            self._page_size,
            q_data_type=torch.bfloat16,
            kv_data_type=heads.kv_dtype,
            sm_scale=exact_scale(heads.scale),
        )
        return self._attend

    def _attend(self, q: torch.Tensor, cache: torch.Tensor, scale: float) -> torch.Tensor:
        del scale  # fixed by the plan
        out: torch.Tensor = self._wrapper.run(q, cache)
        return out


class FlashPrefill:
    """flashinfer's paged prefill; decode rows are prompts of one token.

    Always fa2: on a GPU that other processes used as well, fa3 of flashinfer 0.6.14 gave wrong
    values for some rows. fa2 picks its tile by the mean length of the step's rows, and splits long
    caches by what else there is to do; both would change the order of a row's additions with its
    company. So the cache stays whole, and a row of padding keeps the mean where the tile is largest.
    How a prompt is cut into chunks makes no difference either, because of exact_scale.
    """

    def __init__(self, flashinfer: Any, heads: Heads, page_size: int) -> None:
        self._heads, self._page_size = heads, page_size
        self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            make_scratch(_PROMPT_SCRATCH), "NHD", backend="fa2"
        )

    def plan(self, pages: StepPages) -> Attend:
        heads = self._heads
        group = heads.num_heads // heads.num_kv_heads
        padding = _padding(int(pages.row_start[-1]), len(pages.last_page_len), group)
        if padding:
            pages = _with_row(pages, padding, self._page_size)
        self._wrapper.plan(
            pages.row_start,
            pages.page_start,
            pages.page_ids,
            pages.last_page_len,
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            self._page_size,
            causal=True,
            sm_scale=exact_scale(heads.scale),
            q_data_type=torch.bfloat16,
            kv_data_type=heads.kv_dtype,
            disable_split_kv=True,
        )
        return partial(self._attend, padding)

    def _attend(
        self, padding: int, q: torch.Tensor, cache: torch.Tensor, scale: float
    ) -> torch.Tensor:
        del scale  # fixed by the plan
        queries = torch.cat((q, q.new_zeros((padding, *q.shape[1:])))) if padding else q
        out = dense_room(*queries.shape)
        self._wrapper.run(queries, cache, out=out)
        return out[: len(q)]


def _with_row(pages: StepPages, tokens: int, page_size: int) -> StepPages:
    """The same and a row of so many new tokens, all of whose pages are the step's last one."""
    more = -(-tokens // page_size)
    last = torch.tensor([tokens - (more - 1) * page_size], dtype=torch.int32)
    return StepPages(
        torch.cat((pages.row_start, pages.row_start[-1:] + tokens)),
        torch.cat((pages.page_start, pages.page_start[-1:] + more)),
        torch.cat((pages.last_page_len, last)),
        torch.cat((pages.page_ids, pages.page_ids[-1:].expand(more))),
    )


def _padding(tokens: int, rows: int, group: int) -> int:
    """How many queries a further row needs, so that the mean of queries times group exceeds 64.

    Above it flashinfer's fa2 takes its largest tile (FA2DetermineCtaTileQ). 0: it does already.
    """
    if tokens * group // rows > _LARGE_TILE_MEAN:
        return 0
    return -(-(_LARGE_TILE_MEAN + 1) * (rows + 1) // group) - tokens


class TorchAttention:
    """Row by row with torch's own attention: the fallback, and the reference in tests."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._pages: StepPages | None = None

    def plan(self, pages: StepPages) -> Attend:
        self._pages = pages
        return self._attend

    def _attend(self, q: torch.Tensor, cache: torch.Tensor, scale: float) -> torch.Tensor:
        pages = self._pages
        assert pages is not None
        out = torch.empty_like(q)
        starts, page_starts = pages.row_start.tolist(), pages.page_start.tolist()
        for row, used in enumerate(pages.last_page_len.tolist()):
            first, last = starts[row], starts[row + 1]
            ids = pages.page_ids[page_starts[row] : page_starts[row + 1]].long()
            length = (len(ids) - 1) * self._page_size + used
            held = cache.view(torch.uint8)[ids].view(cache.dtype).to(q.dtype)
            kv = held.transpose(0, 1).reshape(2, -1, cache.shape[3], cache.shape[4])
            k, v = (side[:length].transpose(0, 1).unsqueeze(0) for side in kv)
            tokens = last - first
            position = torch.arange(length - tokens, length, device=q.device).unsqueeze(1)
            mask = torch.arange(length, device=q.device).unsqueeze(0) <= position
            result = torch.nn.functional.scaled_dot_product_attention(
                q[first:last].transpose(0, 1).unsqueeze(0),
                k,
                v,
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
            out[first:last] = result[0].transpose(0, 1)
        return out
