"""The expert set of GPU engines gives what the single expert layer gives; runs without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from kt_async.errors import NativeError
from kt_async.ffi import structs
from kt_async.ffi.copies import copy_to_device
from kt_async.ffi.experts import experts_multiply
from kt_async.ffi.handoff import ExpertSet
from kt_async.ffi.matrix import Matrix
from kt_async.ffi.pool import Pool
from tests.native.quant_data import random_tensor

H, INNER, EXPERTS, TOP_K, MAX_TOKENS = 512, 256, 6, 3, 9
SHAPES = ((T.Q4_K, INNER, H), (T.Q4_K, INNER, H), (T.Q6_K, H, INNER))


@pytest.fixture(params=[1, 2], ids=["one node", "two nodes"])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with Pool(num_threads=2, pin=False, fake_nodes=request.param) as made:
        yield made


@pytest.fixture
def experts(pool: Pool) -> Iterator[ExpertSet]:
    made = ExpertSet(pool, MAX_TOKENS, TOP_K)
    raws = layer_bytes()
    tensors = [
        structs.tensor_at(kind, (EXPERTS, rows, cols), raw.nbytes, raw.ctypes.data)
        for (kind, rows, cols), raw in zip(SHAPES, raws, strict=True)
    ]
    assert made.add_layer(*tensors) == 0
    made.finish()
    yield made
    made.close()


def layer_bytes() -> list[np.ndarray]:
    return [
        np.ascontiguousarray(random_tensor(kind, EXPERTS * rows, cols, seed)).view(np.uint8)
        for seed, (kind, rows, cols) in enumerate(SHAPES)
    ]


def inputs(tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(tokens)
    ids = np.array([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)], np.int32)
    x = rng.standard_normal((tokens, H), np.float32)
    return x, ids, rng.random((tokens, TOP_K), np.float32)


@pytest.mark.parametrize("tokens", [1, 4, MAX_TOKENS])
def test_equals_the_single_layer(pool: Pool, experts: ExpertSet, tokens: int) -> None:
    x, ids, weights = inputs(tokens)
    gate, up, down = (
        Matrix(pool, int(kind), raw, rows, cols, EXPERTS)
        for (kind, rows, cols), raw in zip(SHAPES, layer_bytes(), strict=True)
    )
    out = np.empty_like(x)
    experts.run(0, x, ids, weights, out)
    np.testing.assert_array_equal(out, experts_multiply((gate, up, down), x, ids, weights))
    for matrix in (gate, up, down):
        matrix.close()


def test_a_negative_id_is_left_to_somebody_else(experts: ExpertSet) -> None:
    x, ids, weights = inputs(4)
    skipped, silent = ids.copy(), weights.copy()
    skipped[:, 1] = -1
    silent[:, 1] = 0
    with_skip, with_zero = np.empty_like(x), np.empty_like(x)
    experts.run(0, x, skipped, weights, with_skip)
    experts.run(0, x, ids, silent, with_zero)
    np.testing.assert_allclose(with_skip, with_zero, rtol=1e-6, atol=1e-6)


def test_a_row_without_work_is_left_alone(experts: ExpertSet) -> None:
    x, ids, weights = inputs(MAX_TOKENS)
    expected, out = np.empty_like(x), np.full_like(x, 7)
    experts.run(0, x, ids, weights, expected)
    ids[::2] = -1
    x[::2] = np.nan  # not read either
    experts.run(0, x, ids, weights, out)
    np.testing.assert_array_equal(out[1::2], expected[1::2])
    assert (out[::2] == 7).all()


def test_copies_need_a_cuda_runtime() -> None:
    if "libcudart" in Path("/proc/self/maps").read_text():
        pytest.skip("this process has a CUDA runtime")
    copies = np.zeros((1, 3), np.int64)
    with pytest.raises(NativeError, match="no CUDA runtime"):
        copy_to_device(0, copies)


def test_parts_hold_every_band_once(experts: ExpertSet) -> None:
    for which, (_, rows, _) in enumerate(SHAPES):
        parts = experts.parts(0, which)
        bands = [b for p in parts for b in range(p.first_band, p.first_band + p.num_bands)]
        assert bands == list(range(-(-rows // 16)))
        assert all(p.data.shape == (EXPERTS, p.num_bands * p.band_bytes) for p in parts)


def test_wrong_input_is_refused(experts: ExpertSet) -> None:
    x, ids, weights = inputs(2)
    out = np.empty_like(x)
    with pytest.raises(NativeError, match="outside 0 .. 5"):
        experts.run(0, x, ids + EXPERTS, weights, out)
    with pytest.raises(NativeError, match="layer is 1"):
        experts.run(1, x, ids, weights, out)
    many, many_ids, many_weights = inputs(MAX_TOKENS + 1)
    with pytest.raises(NativeError, match=f"allowed is 0 .. {MAX_TOKENS}"):
        experts.run(0, many, many_ids, many_weights, np.empty_like(many))
