"""Prompt attention against torch, and against itself in other company."""

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
    make_prefill_planner,
)

pytestmark = pytest.mark.gpu

PAGE = 32
HEADS = Heads(16, 2, 128, 128**-0.5)
# New tokens and all positions of each row; few new tokens on long caches are where flashinfer
# would choose other tiles, and would split.
ROWS = [(1, 1), (1, 5000), (3, 900), (7, 7), (12, 300), (40, 4000), (130, 130), (500, 517)]


def step(rows: list[tuple[int, int]], first_page: int = 0) -> StepPages:
    """Rows on consecutive pages from first_page on."""
    used = [-(-positions // PAGE) for _, positions in rows]
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in ([t for t, _ in rows], used)]
    last = torch.tensor([(n - 1) % PAGE + 1 for _, n in rows], dtype=torch.int32)
    ids = torch.arange(first_page, first_page + sum(used), dtype=torch.int32, device="cuda")
    return StepPages(*starts, last, ids)


def test_attention_is_torchs_and_does_not_depend_on_other_rows() -> None:
    planner = make_prefill_planner(HEADS, PAGE)
    if not isinstance(planner, FlashPrefill):
        pytest.skip("needs flashinfer")
    made = torch.Generator().manual_seed(5)
    together = step(ROWS)
    shape = (len(together.page_ids), 2, PAGE, HEADS.num_kv_heads, HEADS.head_dim)
    cache = torch.randn(shape, generator=made).to(torch.bfloat16).cuda()
    queries = (int(together.row_start[-1]), HEADS.num_heads, HEADS.head_dim)
    q = torch.randn(queries, generator=made).to(torch.bfloat16).cuda()
    out = planner.plan(together)(q, cache, HEADS.scale).clone()
    wanted = TorchAttention(PAGE).plan(together)(q.float(), cache, HEADS.scale)
    # bf16 keeps 8 bits; probabilities are rounded to it too before they meet the values.
    assert (out.float() - wanted).abs().max() < 0.02 * wanted.abs().max()
    for row, lengths in enumerate(ROWS):
        begin, end = together.row_start[row : row + 2].tolist()
        alone = step([lengths], int(together.page_start[row]))
        one = planner.plan(alone)(q[begin:end], cache, HEADS.scale)
        assert one.equal(out[begin:end]), lengths
