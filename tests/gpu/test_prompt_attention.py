"""Prompt attention against torch, and against itself in other company and other chunks."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from kt_async.engine.cuda.attention import (  # noqa: E402
    FlashPrefill,
    Heads,
    StepPages,
    TorchAttention,
    exact_scale,
    make_prefill_planner,
)

pytestmark = pytest.mark.gpu

PAGE = 32
# New tokens and all positions of each row; few new tokens on long caches are where flashinfer
# would choose other tiles, and would split.
ROWS = [(1, 1), (1, 5000), (3, 900), (7, 7), (12, 300), (40, 4000), (195, 195), (500, 517)]


def step(rows: list[tuple[int, int]], first_page: int = 0) -> StepPages:
    """Rows on consecutive pages from first_page on."""
    used = [-(-positions // PAGE) for _, positions in rows]
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in ([t for t, _ in rows], used)]
    last = torch.tensor([(n - 1) % PAGE + 1 for _, n in rows], dtype=torch.int32)
    ids = torch.arange(first_page, first_page + sum(used), dtype=torch.int32, device="cuda")
    return StepPages(*starts, last, ids)


@pytest.mark.parametrize("heads", [(16, 2), (32, 4), (4, 2), (8, 8), (28, 4)])
def test_attention_is_torchs_and_does_not_depend_on_other_rows_or_chunks(
    heads: tuple[int, int],
) -> None:
    shape = Heads(*heads, 128, 128**-0.5)
    planner = make_prefill_planner(shape, PAGE)
    if not isinstance(planner, FlashPrefill):
        pytest.skip("needs flashinfer")
    scale = exact_scale(shape.scale)
    made = torch.Generator().manual_seed(5)
    together = step(ROWS)
    size = (len(together.page_ids), 2, PAGE, shape.num_kv_heads, shape.head_dim)
    cache = torch.randn(size, generator=made).to(torch.bfloat16).cuda()
    size = (int(together.row_start[-1]), shape.num_heads, shape.head_dim)
    q = torch.randn(size, generator=made).to(torch.bfloat16).cuda()
    out = planner.plan(together)(q, cache, scale).clone()
    wanted = TorchAttention(PAGE).plan(together)(q.float(), cache, scale)
    # bf16 keeps 8 bits; probabilities are rounded to it too before they meet the values.
    assert (out.float() - wanted).abs().max() < 0.02 * wanted.abs().max()
    for row, (new, positions) in enumerate(ROWS):
        begin, page = int(together.row_start[row]), int(together.page_start[row])
        for cut in {0, new // 3, new // 2, new - 1}:
            pieces = []
            for first, end in ((0, cut), (cut, new)):
                if first < end:
                    alone = step([(end - first, positions - new + end)], page)
                    part = planner.plan(alone)(q[begin + first : begin + end], cache, scale)
                    pieces.append(part.clone())
            assert torch.cat(pieces).equal(out[begin : begin + new]), (new, positions, cut)
