"""kt_experts_multiply against dequantised weights in float64, on every ISA."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as T

from kt_async.errors import NativeError
from kt_async.ffi import structs
from kt_async.ffi.experts import experts_multiply
from kt_async.ffi.host import ISA_NAMES, query_host
from kt_async.ffi.matrix import Matrix, dequantize
from kt_async.ffi.pool import Pool
from tests.native.quant_data import random_tensor
from tests.native.tolerances import INT8_PRODUCT

H, INNER, EXPERTS, TOP_K = 512, 256, 6, 3
ISAS = [ISA_NAMES.index(name) for name in query_host().isas]
# Three products in a row, each with the error of its activations' rounding; f32 ones only round.
EXACT, ROUNDED = 1e-5, 3 * INT8_PRODUCT
F64 = npt.NDArray[np.float64]


class Layer:
    """Random gate, up and down of the given types, packed and exact."""

    def __init__(self, pool: Pool, up_type: T, down_type: T) -> None:
        shapes = [(up_type, INNER, H), (up_type, INNER, H), (down_type, H, INNER)]
        self.matrices: list[Matrix] = []
        self.exact: list[F64] = []
        for seed, (kind, rows, cols) in enumerate(shapes):
            raw = random_tensor(kind, EXPERTS * rows, cols, seed)
            self.matrices.append(Matrix(pool, int(kind), raw, rows, cols, EXPERTS))
            exact = dequantize(int(kind), raw).astype(np.float64)
            self.exact.append(exact.reshape(EXPERTS, rows, cols))

    def run(
        self, x: npt.NDArray[np.float32], ids: npt.NDArray[np.int32], w: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        gate, up, down = self.matrices
        return experts_multiply((gate, up, down), x, ids, w)

    def twin(self, x: npt.NDArray[np.float32], ids: npt.NDArray[np.int32], w: F64) -> F64:
        out = np.zeros((len(x), H))
        gate, up, down = self.exact
        for t, chosen in enumerate(ids):
            for e, weight in zip(chosen, w[t], strict=True):
                g = gate[e] @ x[t]
                inner = g * 0.5 * (1 + np.tanh(g / 2)) * (up[e] @ x[t])
                out[t] += weight * (down[e] @ inner)
        return out

    def close(self) -> None:
        for matrix in self.matrices:
            matrix.close()


def inputs(tokens: int, seed: int = 0) -> tuple[npt.NDArray[np.float32], ...]:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((tokens, H)) * 0.1).astype(np.float32)
    ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)]).astype(np.int32)
    return x, ids, rng.random((tokens, TOP_K)).astype(np.float32)


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(2, pin=False) as opened:
        yield opened


@pytest.mark.parametrize("isa", ISAS, ids=lambda i: ISA_NAMES[i])
@pytest.mark.parametrize(
    ("up_type", "down_type"),
    [(T.F32, T.F32), (T.BF16, T.F16), (T.Q8_0, T.Q8_0), (T.Q4_K, T.Q6_K), (T.Q4_0, T.IQ4_NL),
     (T.Q4_K, T.BF16), (T.IQ2_XS, T.Q4_K)],
    ids=lambda t: t.name,
)  # fmt: skip
def test_matches_exact_weights(isa: int, up_type: T, down_type: T) -> None:
    with Pool(3, isa=isa, pin=False) as pool:
        layer = Layer(pool, up_type, down_type)
        exact = up_type.name.endswith(("F32", "F16")) and down_type.name.endswith(("F32", "F16"))
        for tokens in (1, 2, 5, 70):
            x, ids, w = inputs(tokens)
            expected = layer.twin(x, ids, w.astype(np.float64))
            error = np.linalg.norm(layer.run(x, ids, w) - expected) / np.linalg.norm(expected)
            assert error < (EXACT if exact else ROUNDED)
        layer.close()


@pytest.mark.parametrize("isa", ISAS, ids=lambda i: ISA_NAMES[i])
def test_a_token_alone_has_the_same_bits(isa: int) -> None:
    x, ids, w = inputs(40)
    results = []
    for threads in (1, 4):
        with Pool(threads, isa=isa, pin=False) as pool:
            layer = Layer(pool, T.Q4_K, T.Q6_K)
            together = layer.run(x, ids, w)
            for t in (0, 13, 39):
                alone = layer.run(x[t : t + 1], ids[t : t + 1], w[t : t + 1])
                np.testing.assert_array_equal(alone[0], together[t])
            results.append(together)
            layer.close()
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("tokens", [1, 3, 70, 140])
def test_the_result_does_not_depend_on_the_number_of_workers(tokens: int) -> None:
    """Enough experts that bands are cut into segments, and (140 tokens) too many rows for that."""
    experts, hidden, inner, top_k = 40, 640, 256, 8
    rng = np.random.default_rng(tokens)
    shapes = [(T.Q4_K, inner, 512), (T.Q4_K, inner, 512), (T.Q6_K, hidden, inner)]
    raw = [random_tensor(kind, experts * rows, cols) for kind, rows, cols in shapes]
    x = rng.standard_normal((tokens, 512), np.float32)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    w = rng.random((tokens, top_k)).astype(np.float32)
    results = []
    for threads in (1, 2, 3, 7):
        with Pool(threads, pin=False) as pool:
            gate, up, down = (
                Matrix(pool, int(kind), data, rows, cols, experts)
                for (kind, rows, cols), data in zip(shapes, raw, strict=True)
            )
            with gate, up, down:
                # Who takes which piece differs from run to run.
                results += [experts_multiply((gate, up, down), x, ids, w) for _ in range(5)]
    assert np.isfinite(results[0]).all()
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_skewed_routing(pool: Pool) -> None:
    """Every token on one expert, more rows than a block of the kernels."""
    layer = Layer(pool, T.F32, T.F32)
    x, _, w = inputs(200)
    ids = np.full((200, 1), 4, np.int32)
    expected = layer.twin(x, ids, w[:, :1].astype(np.float64))
    np.testing.assert_allclose(layer.run(x, ids, w[:, :1]), expected, rtol=1e-3, atol=1e-4)
    layer.close()


def test_no_tokens_is_nothing_to_do(pool: Pool) -> None:
    layer = Layer(pool, T.F32, T.F32)
    assert layer.run(*(a[:0] for a in inputs(1))).shape == (0, H)
    layer.close()


def test_bad_arguments(pool: Pool) -> None:
    layer = Layer(pool, T.F32, T.F32)
    x, ids, w = inputs(3)
    for bad in (-1, EXPERTS):
        wrong = ids.copy()
        wrong[2, 1] = bad
        with pytest.raises(NativeError, match=rf"ids\[7\] is {bad}, allowed is 0 .. 5") as error:
            layer.run(x, wrong, w)
        assert error.value.status == structs.KT_ERR_ARGUMENT
    gate, up, down = layer.matrices
    with pytest.raises(NativeError, match="do not fit together"):
        experts_multiply((gate, down, up), x, ids, w)
    with pytest.raises(NativeError, match="top_k is 7"):
        layer.run(x, np.zeros((3, 7), np.int32), np.ones((3, 7), np.float32))
    with Pool(1) as other:
        foreign = Layer(other, T.F32, T.F32)
        with pytest.raises(NativeError, match="different pools"):
            experts_multiply((gate, foreign.matrices[1], down), x, ids, w)
        foreign.close()
    layer.close()
