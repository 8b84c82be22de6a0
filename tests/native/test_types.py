"""Type table and decoders against the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import quants

from kt_async.errors import NativeError
from kt_async.ffi import matrix, structs

from .quant_data import ALL_TYPES, FAST_TYPES, QUANTISED, random_tensor, reference


@pytest.mark.parametrize("kind", ALL_TYPES, ids=lambda kind: kind.name)
def test_type_info_matches_gguf(kind: T) -> None:
    info = matrix.type_info(int(kind))
    assert (info.block_size, info.block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    assert info.name == kind.name
    assert info.has_kernel == (matrix.FAST if kind in FAST_TYPES else matrix.GENERIC)


@pytest.mark.parametrize("kind", ALL_TYPES, ids=lambda kind: kind.name)
def test_dequantize_is_bit_exact(kind: T) -> None:
    data = random_tensor(kind, 64, 768, seed=1)
    got = matrix.dequantize(int(kind), data)
    np.testing.assert_array_equal(
        got.view(np.uint32), reference(kind, data, 768).reshape(-1).view(np.uint32)
    )


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_dequantize_any_bits(kind: T) -> None:
    """Scales of every kind, NaN, infinity and subnormal ones too."""
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(int(kind)).integers(0, 256, 500 * num_bytes, dtype=np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = quants.dequantize(data, kind)
    got = matrix.dequantize(int(kind), data)
    finite = np.isfinite(expected)
    assert got.size == 500 * size
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    np.testing.assert_array_equal(got[finite], expected[finite])
    assert 0.3 < finite.mean() <= 1.0


def test_every_half_decodes() -> None:
    halves = np.arange(65536, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        expected = halves.view(np.float16).astype(np.float32)
    got = matrix.dequantize(int(T.F16), halves)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(got[numbers].view(np.uint32), expected[numbers].view(np.uint32))
    assert np.isnan(got[~numbers]).all()


def test_unknown_type_is_refused() -> None:
    with pytest.raises(NativeError, match="type 9999 is unknown") as caught:
        matrix.type_info(9999)
    assert caught.value.status == structs.KT_ERR_UNSUPPORTED


def test_partial_block_is_refused() -> None:
    with pytest.raises(NativeError, match="143 bytes are not a whole number of Q4_K blocks"):
        matrix.dequantize(int(T.Q4_K), np.zeros(143, np.uint8))
