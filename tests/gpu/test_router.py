"""The fused router and the fused sum of experts against torch, and a row alone against company."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from bench.cuda_tools import Acts  # noqa: E402
from kt_async.engine.cuda.kv import KvPages  # noqa: E402
from kt_async.engine.cuda.ops import CudaOps  # noqa: E402
from kt_async.engine.cuda.values import ExpertSum, NormOf, Rows  # noqa: E402
from kt_async.ffi.cuda import Kernels, compile_kernels, kernel_source  # noqa: E402
from kt_async.model.ops import Routing  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def ops() -> Any:
    torch.zeros(1).cuda()
    major, minor = torch.cuda.get_device_capability()
    suffix = "a" if major >= 9 else ""
    kernels = Kernels(compile_kernels(kernel_source([12]), f"sm_{major}{minor}{suffix}", None))
    return CudaOps(kernels, {}, KvPages([]), 32, None, few=True)  # type: ignore[arg-type]


def random(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


def normed(ops: Any, x: Any, weight: Any) -> Rows:
    out = ops.prepared(len(x), x.shape[1], f32=True)
    out.norm_of = NormOf(Rows(x, x.shape[1]), weight, 1e-6)
    return out  # type: ignore[no-any-return]


def check_forms(rows: Rows) -> None:
    assert rows.f32 is not None
    assert rows.meta is not None
    assert rows.q is not None
    made = Acts(rows.q, rows.meta, rows.count)
    blocks = rows.f32.view(rows.count, -1, 32).double()
    scale, back = made.scales().view_as(blocks), made.values().view_as(blocks)
    assert torch.allclose(scale, (blocks.abs().amax(2, keepdim=True) / 127).expand_as(blocks))
    assert ((back - blocks).abs() <= scale * 0.501).all()
    assert torch.allclose(made.sums(), back.sum(2), atol=2e-4)


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 40])
@pytest.mark.parametrize(("experts", "cols", "top_k"), [(128, 2048, 8), (16, 256, 2), (60, 96, 4)])
@pytest.mark.parametrize("has_norm", [True, False])
def test_router(ops: Any, rows: int, experts: int, cols: int, top_k: int, has_norm: bool) -> None:
    x, w = random(rows, cols), random(experts, cols, seed=1) * cols**-0.5
    weight = 1 + 0.1 * random(cols, seed=2)
    routing = Routing(top_k, "softmax", norm_topk=True)
    given = normed(ops, x, weight) if has_norm else Rows(x, cols)
    ids, weights = ops.router(ops, given, w, routing, None)
    groups = ops.router.groups
    torch.cuda.synchronize()
    values = x
    if has_norm:
        values = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * weight
        assert torch.allclose(given.f32, values, atol=1e-5)
        check_forms(given)
    scores = (values.double() @ w.double().T).softmax(1)
    best = scores.topk(top_k, 1)
    assert torch.equal(ids.long(), best.indices)
    expected = best.values / best.values.sum(1, keepdim=True)
    assert torch.allclose(weights.double(), expected, atol=1e-5)
    assert (groups is None) == (rows == 1)
    if groups is not None:
        flat = ids.flatten().tolist()
        words = groups.words.tolist()
        active, start = words[: experts + 1], words[experts + 1 : 2 * experts + 2]
        order = words[2 * experts + 2 :]
        assert active[: active[experts]] == sorted(set(flat))
        assert order == sorted(range(len(flat)), key=lambda i: (flat[i], i))
        assert start == [sum(e < n for e in flat) for n in range(experts + 1)]
    for row in range(min(rows, 3)):
        alone = normed(ops, x[row : row + 1], weight) if has_norm else Rows(x[row : row + 1], cols)
        one_id, one_weight = ops.router(ops, alone, w, routing, None)
        assert torch.equal(one_id[0], ids[row])
        assert torch.equal(one_weight[0], weights[row])
        if has_norm:
            together = Acts(given.q, given.meta, rows).values()[row]
            assert torch.equal(Acts(alone.q, alone.meta, 1).values()[0], together)


def test_router_of_prompts(ops: Any) -> None:
    x, w = random(300, 160), random(48, 160, seed=1)
    routing = Routing(4, "softmax", norm_topk=True)
    ops.few = False
    try:
        ids, weights = ops.router(ops, Rows(x, 160), w, routing, None)
        some = [ops.router(ops, Rows(x[:n], 160), w, routing, None) for n in (1, 63, 65)]
    finally:
        ops.few = True
    best = (x.double() @ w.double().T).softmax(1).topk(4, 1)
    assert torch.equal(ids.long(), best.indices)
    expected = best.values / best.values.sum(1, keepdim=True)
    assert torch.allclose(weights.double(), expected, atol=1e-5)
    for few_ids, few_weights in some:
        assert torch.equal(few_ids, ids[: len(few_ids)])
        assert torch.equal(few_weights, weights[: len(few_weights)])


def test_router_ties_go_to_the_lower_id(ops: Any) -> None:
    x, w = random(3, 64), random(1, 64).repeat(32, 1)
    ids, weights = ops.router(ops, Rows(x, 64), w, Routing(4, "softmax", norm_topk=True), None)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    assert torch.allclose(weights, torch.full_like(weights, 0.25))


@pytest.mark.parametrize("groups", [0, 4])
def test_router_with_sigmoid_bias_and_groups(ops: Any, groups: int) -> None:
    x, w, bias = random(5, 128), random(32, 128, seed=1) * 0.1, random(32, seed=2) * 0.1
    routing = Routing(4, "sigmoid", True, 2.5, groups, 2, group_sum_of_two=True)
    ids, weights = ops.router(ops, Rows(x, 128), w, routing, bias)
    scores = (x @ w.T).sigmoid()
    choice = scores + bias
    if groups:
        best = choice.view(5, groups, -1).topk(2, 2).values.sum(2).topk(2, 1).indices
        kept = torch.zeros(5, groups, device="cuda").scatter_(1, best, 1).repeat_interleave(8, 1)
        choice = choice.masked_fill(kept == 0, -1e30)
    expected = choice.topk(4, 1).indices
    assert torch.equal(ids.long(), expected)
    chosen = scores.gather(1, expected)
    assert torch.allclose(weights, 2.5 * chosen / chosen.sum(1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize(("rows", "cols"), [(1, 2048), (5, 96), (16, 4096)])
def test_sum_of_experts_with_the_norm_that_follows(ops: Any, rows: int, cols: int) -> None:
    top_k = 8
    ids = torch.arange(rows * top_k, dtype=torch.int32).view(rows, top_k).cuda()
    ids[0, 1] = -1  # somebody else's
    value = ExpertSum(
        random(rows * top_k, cols), ids, random(rows, top_k, seed=1), random(rows, cols, seed=2)
    )
    weight = 1 + 0.1 * random(cols, seed=3)
    ops.weights = {"norm": weight}
    x = Rows(torch.empty(rows, cols, device="cuda"), cols, sum_of=value)
    out = ops.rms_norm(x, "norm", 1e-6)
    plain = Rows(torch.empty(rows, cols, device="cuda"), cols, sum_of=value)
    ops.settle(plain)
    torch.cuda.synchronize()
    used = value.weights * (ids >= 0)
    expected = value.residual + (value.partial.view(rows, top_k, cols) * used.unsqueeze(2)).sum(1)
    assert torch.allclose(x.f32, expected, atol=1e-5)
    assert torch.equal(plain.f32, x.f32)
    norm = expected * torch.rsqrt(expected.square().mean(1, keepdim=True) + 1e-6) * weight
    assert torch.allclose(out.f32, norm, atol=1e-5)
    check_forms(out)
