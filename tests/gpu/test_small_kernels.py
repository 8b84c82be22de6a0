"""Kernels around the products, against torch: norms, embedding, and the experts of prompts."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from bench.cuda_tools import Acts, Weights, make_weights, reference  # noqa: E402
from kt_async.engine.cuda.grouped import HostPart, sort_rows, sum_rows  # noqa: E402
from kt_async.engine.cuda.kernels import kernels_for  # noqa: E402
from kt_async.engine.cuda.kv import KvPages  # noqa: E402
from kt_async.engine.cuda.ops import CudaOps  # noqa: E402
from kt_async.engine.cuda.values import Rows, StepTensors  # noqa: E402
from kt_async.ffi.pool import Pool  # noqa: E402

pytestmark = pytest.mark.gpu

PTR, I32 = ctypes.c_void_p, ctypes.c_int32
EXPERTS, HIDDEN, WIDTH, TOP_K = 12, 512, 96, 4


@pytest.fixture(scope="module")
def ops() -> Any:
    return CudaOps(kernels_for({8}, None), {}, KvPages([]), 32, None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2) as made:
        yield made


def random(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


def weights(pool: Pool, rows: int, cols: int, experts: int) -> Weights:
    return make_weights(pool, "Q8_0", rows, cols, experts, np.random.default_rng(1))


def drawn_ids(tokens: int) -> Any:
    """int32 [T, K], experts of a token differ; some pairs are nobody's."""
    rng = np.random.default_rng(tokens)
    ids = np.stack([rng.permutation(EXPERTS - 1)[:TOP_K] for _ in range(tokens)])
    ids[rng.random(ids.shape) < 0.1] = -1
    return torch.from_numpy(ids.astype(np.int32)).cuda()


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_rows_by_expert(ops: Any, tokens: int, shares: bool) -> None:
    ids = drawn_ids(tokens)
    on_gpu = [not shares or e % 3 != 1 for e in range(EXPERTS)]
    flags = torch.tensor(on_gpu, dtype=torch.uint8).pin_memory()
    out = torch.zeros(tokens, HIDDEN).pin_memory()
    made = sort_rows(ops, ids, EXPERTS, HostPart(flags, out) if shares else None)
    flat = ids.flatten().tolist()
    order = sorted((i for i, e in enumerate(flat) if e >= 0 and on_gpu[e]), key=lambda i: flat[i])
    assert made.order.tolist()[: len(order)] == order
    ends = [sum(flat[i] <= e for i in order) for e in range(EXPERTS)]
    assert made.ends.tolist() == ends
    place = {pair: row for row, pair in enumerate(order)}
    expected = [-1 if e < 0 else place[i] if on_gpu[e] else -2 for i, e in enumerate(flat)]
    assert made.position.tolist() == expected


@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_rows_gated_and_summed(ops: Any, tokens: int) -> None:
    ids = drawn_ids(tokens)
    made = sort_rows(ops, ids, EXPERTS, None)
    count = int(made.ends[-1])
    both = random(ids.numel(), 2 * WIDTH, seed=1).bfloat16()
    hidden = torch.full((ids.numel(), WIDTH), 7.0, dtype=torch.bfloat16, device="cuda")
    arguments = [PTR(both.data_ptr()), I32(WIDTH), made.num_rows, PTR(hidden.data_ptr())]
    ops.launch("silu_mul_rows", (ids.numel(), 1), arguments)
    gate, up = both[:count, :WIDTH].double(), both[:count, WIDTH:].double()
    assert torch.allclose(hidden[:count].double(), gate * gate.sigmoid() * up, rtol=0.01, atol=1e-3)
    assert (hidden[count:] == 7.0).all()

    y, weight = random(ids.numel(), HIDDEN, seed=2).bfloat16(), random(tokens, TOP_K, seed=3)
    residual = random(tokens, HIDDEN, seed=4)
    total = sum_rows(ops, y, made, weight, residual)
    mine = y.double()[made.position.clamp(min=0).long()].view(tokens, TOP_K, HIDDEN)
    scale = (weight * (ids >= 0)).double().unsqueeze(2)
    assert torch.allclose(total.double(), residual + (mine * scale).sum(1), atol=1e-5)


def test_the_sum_of_the_host_is_added_where_there_is_one(ops: Any) -> None:
    ids, weight = drawn_ids(50), random(50, TOP_K)
    flags = torch.tensor([e != 3 for e in range(EXPERTS)], dtype=torch.uint8).pin_memory()
    part = HostPart(flags, random(50, HIDDEN, seed=1).cpu().pin_memory())
    made = sort_rows(ops, ids, EXPERTS, part)
    residual = random(50, HIDDEN, seed=2)
    total = sum_rows(ops, None, made, weight, residual, part)
    has_host = (ids == 3).any(1, keepdim=True)
    assert torch.equal(total, torch.where(has_host, residual + part.out.cuda(), residual))


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(("rows", "cols"), [(1, 2048), (3, 96), (20, 512)])
def test_norm_and_gate(ops: Any, rows: int, cols: int, few: bool) -> None:
    ops.weights, ops.few = {"norm": 1 + 0.1 * random(cols, seed=1)}, few
    x, up = random(rows, cols), random(rows, cols, seed=2)
    made = ops.rms_norm(Rows(x, cols), "norm", 1e-6)
    ops.settle(made)
    normed = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * ops.weights["norm"]
    gated = ops.silu_mul(Rows(x, cols), Rows(up, cols))
    for rows_made, expected in ((made, normed), (gated, x * x.sigmoid() * up)):
        assert torch.allclose(rows_made.f32, expected, atol=1e-5, rtol=1e-5)
        if few:
            back = Acts(rows_made.q, rows_made.meta, rows).values().float()
            assert torch.allclose(back, expected, atol=float(expected.abs().max()) / 200)
        else:
            assert torch.equal(rows_made.bf16, rows_made.f32.bfloat16())
    plain = Rows(x, cols)
    ops.quantized(plain)
    back = Acts(plain.q, plain.meta, rows).values().float()
    assert torch.allclose(back, x, atol=float(x.abs().max()) / 200)


def test_embedding(ops: Any, pool: Pool) -> None:
    table = weights(pool, 100, HIDDEN, 1)
    ops.weights = {"table": table.matrix}
    tokens = torch.tensor([0, 99, 17, -2, -1], dtype=torch.int32).cuda()
    sampled = torch.tensor([50, 16], dtype=torch.int32).cuda()
    ops.step = StepTensors(tokens, tokens, tokens, tokens.long(), sampled, None)
    made = ops.embed("table")
    exact = reference(table, 0, slice(0, 100))[[0, 99, 17, 16, 50]]
    assert torch.allclose(made.f32.double(), exact, atol=1e-6)
