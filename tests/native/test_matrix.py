"""Packing and the matrix kernels of every ISA this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as T

from kt_async.errors import NativeError
from kt_async.ffi import structs
from kt_async.ffi.host import isa_number, query_host
from kt_async.ffi.matrix import Matrix, peak_rate
from kt_async.ffi.pool import Pool

from . import tolerances
from .quant_data import ALL_TYPES, FLOATS, block_size, random_tensor, reference

F32 = npt.NDArray[np.float32]
ISAS = query_host().isas
# 37 rows: two whole bands and one with 5 rows. Columns: one and a bit tiles where the type allows.
ROWS = 37


def odd_cols(kind: T) -> int:
    return {1: 295, 32: 288, 256: 512}[block_size(kind)]


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[str, Pool]]:
    made = {isa: Pool(2, isa=isa_number(isa), pin=False) for isa in ISAS}
    for isa, pool in made.items():
        assert isa in pool.describe()
    yield made
    for pool in made.values():
        pool.close()


def activations(num_rows: int, cols: int) -> F32:
    return np.random.default_rng([num_rows, cols]).standard_normal((num_rows, cols), np.float32)


def rounded(x: F32) -> npt.NDArray[np.float64]:
    """What the int8 form of x stands for: one scale per 32 columns."""
    blocks = x.reshape(len(x), -1, 32)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    inverse = np.divide(np.float32(127), largest, where=largest > 0, out=np.zeros_like(largest))
    q = np.rint(blocks * inverse)
    return (q.astype(np.float64) * (largest / np.float32(127))).reshape(x.shape)


def float_tolerance(kind: T, isa: str, otherwise: float) -> float:
    return tolerances.BF16_TILE_PRODUCT if (kind, isa) == (T.BF16, "amx") else otherwise


def error(got: F32, expected: npt.NDArray[np.float64]) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", ALL_TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("wide", [False, True])
def test_unpack_inverts_pack(kind: T, wide: bool, pools: dict[str, Pool]) -> None:
    cols = 2048 if wide else odd_cols(kind)
    size = block_size(kind)
    num_bytes = len(random_tensor(kind, 1, size)) * 3 * ROWS * cols // size
    data = np.random.default_rng(7).integers(0, 256, num_bytes, dtype=np.uint8)  # any bits
    with Matrix(pools["scalar"], int(kind), data, ROWS, cols, num_experts=3) as packed:
        np.testing.assert_array_equal(packed.unpack(), data)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ALL_TYPES, ids=lambda kind: kind.name)
def test_product(kind: T, isa: str, pools: dict[str, Pool]) -> None:
    """Against f64 products of the decoded weights, for every number of rows up to 21."""
    cols = odd_cols(kind)
    data = random_tensor(kind, ROWS, cols)
    weights = reference(kind, data, cols).astype(np.float64)
    x = activations(21, cols)
    exact = x.astype(np.float64) @ weights.T
    with Matrix(pools[isa], int(kind), data, ROWS, cols) as packed:
        whole = packed.multiply(x)
        if kind in FLOATS:
            assert error(whole, exact) < float_tolerance(kind, isa, tolerances.FLOAT_PRODUCT)
        else:
            assert error(whole, exact) < tolerances.INT8_PRODUCT
            assert error(whole, rounded(x) @ weights.T) < tolerances.ROUNDED_PRODUCT
        # A row has the same bits alone and in any company.
        for count in range(1, 21):
            np.testing.assert_array_equal(packed.multiply(x[:count]), whole[:count])
        np.testing.assert_array_equal(packed.multiply(x[5:9]), whole[5:9])


@pytest.mark.parametrize("kind", ALL_TYPES, ids=lambda kind: kind.name)
def test_isas_agree(kind: T, pools: dict[str, Pool]) -> None:
    cols = odd_cols(kind)
    data = random_tensor(kind, ROWS, cols, seed=3)
    x = activations(40, cols)
    results = {}
    for isa, pool in pools.items():
        with Matrix(pool, int(kind), data, ROWS, cols) as packed:
            results[isa] = packed.multiply(x)
    for isa, result in results.items():
        limit = float_tolerance(kind, isa, tolerances.BETWEEN_ISAS)
        assert error(result, results["scalar"].astype(np.float64)) < limit


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [T.Q8_0, T.Q4_0, T.Q6_K, T.IQ4_NL, T.Q5_K], ids=lambda k: k.name)
def test_integer_sums_are_exact(kind: T, isa: str, pools: dict[str, Pool]) -> None:
    """Powers of two as scales and extreme values: every ISA must give the exact result."""
    cols = 256
    rng = np.random.default_rng(11)
    data = random_tensor(kind, 16, cols, seed=5).reshape(16 * cols // block_size(kind), -1)
    one = np.array([1.0], np.float16).view(np.uint8)
    fields = {T.Q6_K: [208], T.Q5_K: [0, 2]}.get(kind, [0])
    for offset in fields:
        data[:, offset : offset + 2] = one
    if kind is T.Q8_0:
        data[::2, 2:] = 0x80  # -128 everywhere: the largest products
    x = rng.choice([-127.0, 127.0], (9, cols)).astype(np.float32)
    weights = reference(kind, data.reshape(-1), cols).astype(np.float64)
    with Matrix(pools[isa], int(kind), data.reshape(-1), 16, cols) as packed:
        np.testing.assert_array_equal(packed.multiply(x), x.astype(np.float64) @ weights.T)


@pytest.mark.parametrize("isa", ISAS)
def test_unusual_activations(isa: str, pools: dict[str, Pool]) -> None:
    data = random_tensor(T.Q8_0, 16, 64)
    x = np.zeros((5, 64), np.float32)
    x[1, 3] = np.nan
    x[2, 40] = np.inf
    x[3] = 1e-42  # subnormal
    x[4] = 1e30
    with Matrix(pools[isa], int(T.Q8_0), data, 16, 64) as packed:
        out = packed.multiply(x)
        assert packed.multiply(np.empty((0, 64), np.float32)).shape == (0, 16)
    assert (out[0] == 0).all()
    assert np.isnan(out[1]).all()
    assert not np.isfinite(out[2]).any()
    assert np.abs(out[3]).max() < 1e-38
    assert np.isfinite(out[4]).all()


@pytest.mark.parametrize(
    ("kind", "shape", "num_bytes", "status", "message"),
    [
        (9999, (1, 16, 256), 64, structs.KT_ERR_UNSUPPORTED, "type 9999 has no kernel"),
        (T.Q4_K, (1, 16, 250), 64, structs.KT_ERR_ARGUMENT, "250 columns are not a multiple"),
        (T.Q4_K, (2, 16, 256), 4607, structs.KT_ERR_ARGUMENT, "num_bytes is 4607, expected 4608"),
        (T.Q4_K, (1, 0, 256), 64, structs.KT_ERR_ARGUMENT, "at least 1"),
        (T.F32, (2**31 - 1,) * 3, 64, structs.KT_ERR_ARGUMENT, "more than any memory holds"),
    ],
)
def test_bad_tensors(
    kind: int,
    shape: tuple[int, int, int],
    num_bytes: int,
    status: int,
    message: str,
    pools: dict[str, Pool],
) -> None:
    experts, rows, cols = shape
    data = np.zeros(num_bytes, np.uint8)
    with pytest.raises(NativeError, match=message) as caught:
        Matrix(pools["scalar"], int(kind), data, rows, cols, num_experts=experts)
    assert caught.value.status == status


def test_bad_calls(pools: dict[str, Pool]) -> None:
    data = random_tensor(T.Q8_0, 32, 64)
    x = activations(1, 64)
    with Matrix(pools["scalar"], int(T.Q8_0), data, 16, 64, num_experts=2) as packed:
        for expert in (-1, 2):
            with pytest.raises(NativeError, match=f"expert is {expert}, the matrix has 2"):
                packed.multiply(x, expert)
        with pytest.raises(NativeError, match=r"shape \(1, 32\), expected \[m, 64\]"):
            packed.multiply(x[:, :32])
        second = reference(T.Q8_0, data, 64)[16:].astype(np.float64)
        assert error(packed.multiply(x, 1), x @ second.T) < tolerances.INT8_PRODUCT


@pytest.mark.parametrize("isa", ISAS)
def test_peak_rates(isa: str, pools: dict[str, Pool]) -> None:
    """Every ISA has f32 multiply-adds; integer and bf16 ones where the CPU has the instruction."""
    kinds = [kind for kind in range(3) if peak_rate(pools[isa], kind) is not None]
    expected = {"scalar": [2], "avx512vnni": [0, 1, 2], "amx": [0, 1, 2]}.get(isa, [0, 2])
    assert kinds == expected
    with pytest.raises(NativeError, match="kind is 3, allowed is 0"):
        peak_rate(pools[isa], 3)
