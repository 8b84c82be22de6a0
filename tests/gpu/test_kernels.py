"""The CUDA kernels over packed weights against gguf's decoder, and each row against itself alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from bench.cuda_tools import (  # noqa: E402
    Launcher,
    Shape,
    check_experts,
    check_linear,
    check_prompt_experts,
    compile_types,
    draw_ids,
    make_weights,
    quantize,
    reference,
)
from kt_async.engine.cuda import gemv as cuda_gemv  # noqa: E402
from kt_async.ffi.pool import Pool  # noqa: E402
from kt_async.weights.gguf_header import TYPE_IDS  # noqa: E402

pytestmark = pytest.mark.gpu

TYPES = [
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
]
WHOLE_TILES = {"Q4_K", "Q5_K", "Q6_K", "IQ4_XS"}  # columns in 256


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2) as made:
        yield made


Launchers = dict[tuple[str, ...], Launcher]
EXPERTS = [("Q4_K", "Q6_K"), ("Q8_0", "Q8_0"), ("MXFP4", "Q4_0")]


def types_of(item: pytest.Item) -> tuple[str, ...]:
    """The types that a test of this file needs."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    names = parameters.get("names", (parameters.get("name"),))
    return ("Q4_K", "Q6_K") if names == (None,) else tuple(sorted(set(names)))


@pytest.fixture(scope="module")
def launchers(request: pytest.FixtureRequest) -> Launchers:
    """By types; compiled in threads, which takes long for all types in one."""
    here = [i for i in request.session.items if "launchers" in getattr(i, "fixturenames", ())]
    sets = sorted({types_of(item) for item in here})
    with ThreadPoolExecutor(8) as threads:
        cubins = threads.map(lambda names: compile_types(TYPE_IDS[n] for n in names), sets)
        return {names: Launcher(cubin) for names, cubin in zip(sets, cubins, strict=True)}


def columns(name: str) -> list[int]:
    """Whole tiles, many tiles, a last tile of one, three, four or five blocks."""
    return [256, 2304] if name in WHOLE_TILES else [2048, 32, 96, 384, 672]


@pytest.mark.parametrize("name", TYPES)
def test_linear(launchers: Launchers, pool: Pool, name: str) -> None:
    ops = launchers[(name,)]
    rng = np.random.default_rng(1)
    torch.manual_seed(1)
    for cols in columns(name):
        weights = make_weights(pool, name, 100, cols, 1, rng)
        for count in (1, 2, 3, 4, 5, 8, 9, 16, 21):
            check_linear(ops, weights, torch.randn((count, cols), device="cuda"))


@pytest.mark.parametrize("name", TYPES)
def test_dequantize(launchers: Launchers, pool: Pool, name: str) -> None:
    ops = launchers[(name,)]
    rng = np.random.default_rng(2)
    for cols in columns(name):
        weights = make_weights(pool, name, 48, cols, 2, rng)
        out = torch.empty((2, 48, cols), dtype=torch.bfloat16, device="cuda")
        cuda_gemv.dequantize(ops, weights.matrix, out)
        for expert in range(2):
            exact = reference(weights, expert, slice(0, 48))
            assert float((out[expert].double() - exact).abs().max()) <= float(
                exact.abs().max() * 2**-8
            )


@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("names", EXPERTS)
def test_experts(launchers: Launchers, pool: Pool, names: tuple[str, str], tokens: int) -> None:
    ops = launchers[tuple(sorted(set(names)))]
    rng = np.random.default_rng(3)
    torch.manual_seed(3)
    shape = Shape(512, 256, 12, 4)  # some experts get more than eight of 64 pairs
    up_type, down_type = names
    layer = (
        make_weights(pool, up_type, shape.width, shape.hidden, shape.experts, rng),
        make_weights(pool, up_type, shape.width, shape.hidden, shape.experts, rng),
        make_weights(pool, down_type, shape.hidden, shape.width, shape.experts, rng),
    )
    x = torch.randn((tokens, shape.hidden), device="cuda")
    check_experts(ops, layer, x, draw_ids(tokens, shape, rng))


PROMPT_EXPERTS = [("Q4_K", "Q6_K", "Q4_K"), *((name, name, name) for name in TYPES)]


@pytest.mark.parametrize("names", PROMPT_EXPERTS)
def test_prompt_experts(launchers: Launchers, pool: Pool, names: tuple[str, str, str]) -> None:
    """Fewer rows than an instruction takes, and more than one block's in turns."""
    ops = launchers[tuple(sorted(set(names)))]
    rng = np.random.default_rng(6)
    torch.manual_seed(6)
    width = 768 if set(names) & WHOLE_TILES else 672
    shape = Shape(width + 256, width, 6, 3)
    sizes = [(shape.width, shape.hidden)] * 2 + [(shape.hidden, shape.width)]
    gate, up, down = (
        make_weights(pool, name, *size, shape.experts, rng)
        for name, size in zip(names, sizes, strict=True)
    )
    for tokens in (1, 7, 64, 500):
        ids = draw_ids(tokens, shape, rng)
        ids[:, 0] = torch.where(ids[:, 1:].eq(2).any(1), ids[:, 0], 2)  # one expert gets most
        ids[ids == 5] = -1  # one expert is somebody else's
        x = torch.randn((tokens, shape.hidden), device="cuda").bfloat16()
        check_prompt_experts(ops, (gate, up, down), x, ids)


def test_three_matrices_biases_and_a_residual(launchers: Launchers, pool: Pool) -> None:
    ops = launchers[("Q4_K", "Q6_K")]
    rng = np.random.default_rng(4)
    torch.manual_seed(4)
    made = [
        make_weights(pool, name, rows, 512, 1, rng)
        for name, rows in (("Q4_K", 96), ("Q4_K", 20), ("Q6_K", 33))
    ]
    x = quantize(torch.randn((3, 512), device="cuda"))
    residual = torch.randn((3, 96), device="cuda")
    bias = torch.randn(33, device="cuda")
    matrices = [w.matrix for w in made]
    biases = [None, None, bias]
    plain = cuda_gemv.multiply(ops, x.arg(), 3, matrices, [None] * 3, None)
    full = cuda_gemv.multiply(ops, x.arg(), 3, matrices, biases, residual)
    assert torch.equal(full[0], plain[0] + residual)
    assert torch.equal(full[1], plain[1])
    assert torch.equal(full[2], plain[2] + bias)
