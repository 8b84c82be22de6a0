"""What the planner of prompt steps tells flashinfer, with a stand-in for it; needs no GPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kt_async.engine.cuda import attention
from kt_async.engine.cuda.attention import FlashPrefill, Heads, StepPages, exact_scale

PAGE = 64


class Wrapper:
    """Keeps what it was told; every query's result is the query."""

    def __init__(self, _scratch: torch.Tensor, _layout: str, *, backend: str) -> None:
        assert backend == "fa2"

    def plan(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options

    def run(self, q: torch.Tensor, _cache: torch.Tensor, *, out: torch.Tensor) -> None:
        assert len(q) == int(self.args[0][-1])
        out.copy_(q)


class Flashinfer:
    BatchPrefillWithPagedKVCacheWrapper = Wrapper


def step(lengths: list[int], pages_of: list[int]) -> StepPages:
    """Rows with so many new tokens each, on so many pages."""
    starts = [torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (lengths, pages_of)]
    return StepPages(
        *starts,
        torch.full((len(lengths),), 3, dtype=torch.int32),
        torch.arange(sum(pages_of), dtype=torch.int32) + 7,
    )


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "make_scratch", lambda _bytes: torch.zeros(1))
    monkeypatch.setattr(attention, "dense_room", lambda *shape: torch.zeros(shape))


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=20),
    st.sampled_from([(32, 4), (64, 4), (16, 16), (4, 2), (96, 1)]),
)
def test_every_step_gets_the_largest_tile_and_whole_caches(
    lengths: list[int], heads: tuple[int, int]
) -> None:
    planner = FlashPrefill(Flashinfer, Heads(*heads, 128, 1.0), PAGE)
    pages = step(lengths, [1 + n % 3 for n in lengths])
    attend = planner.plan(pages)
    wrapper: Wrapper = planner._wrapper
    row_start, page_start, page_ids, last_page_len, *_ = wrapper.args
    rows, group = len(row_start) - 1, heads[0] // heads[1]
    # flashinfer's rule: the mean of the rows' queries times group, rounded down.
    assert int(row_start[-1]) * group // rows > 64
    assert wrapper.options["disable_split_kv"] is True
    assert wrapper.options["sm_scale"] == exact_scale(1.0)
    # The step's rows are as they were, a row of padding has one position for each query.
    assert row_start[: len(lengths) + 1].equal(pages.row_start)
    assert page_start[: len(lengths) + 1].equal(pages.page_start)
    assert page_ids[: len(pages.page_ids)].equal(pages.page_ids)
    assert len(page_start) == rows + 1
    assert len(last_page_len) == rows
    assert len(page_ids) == int(page_start[-1])
    if rows > len(lengths):
        positions = int(page_start[-1] - page_start[-2] - 1) * PAGE + int(last_page_len[-1])
        assert positions == int(row_start[-1] - row_start[-2])
    q = torch.randn(sum(lengths), 2, 4)
    assert attend(q, torch.zeros(1), 1.0).equal(q)


def test_long_rows_need_no_padding() -> None:
    planner = FlashPrefill(Flashinfer, Heads(32, 4, 128, 1.0), PAGE)
    pages = step([9, 500], [1, 8])
    planner.plan(pages)
    assert planner._wrapper.args[0] is pages.row_start


@pytest.mark.parametrize("scale", [1.0, 0.5, *(d**-0.5 for d in (64, 80, 96, 128, 192, 256))])
def test_the_scale_is_a_power_of_two_once_it_meets_log2(scale: float) -> None:
    """flashinfer multiplies both as f32; queries grow or shrink by less than half a bit."""
    left = exact_scale(scale)
    product = np.float32(left) * np.float32(math.log2(math.e))
    assert math.frexp(float(product))[0] == 0.5
    assert 2**-0.5 <= scale / left <= 2**0.5
