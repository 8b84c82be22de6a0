"""The numpy encoders against the gguf package's decoders."""

from __future__ import annotations

import numpy as np
import pytest

from kt_async.weights.source import TYPE_IDS, TYPES
from tests.reference.quantize import dequantize, quantize

# Relative RMS error on Gaussian weights: about what ggml's own encoders reach, times 1.5.
BOUNDS = {
    "F32": 0.0,
    "F16": 3e-4,
    "BF16": 2.5e-3,
    "Q8_0": 0.008,
    "Q6_K": 0.03,
    "Q5_K": 0.06,
    "Q5_0": 0.06,
    "Q5_1": 0.06,
    "Q4_K": 0.12,
    "Q4_0": 0.13,
    "Q4_1": 0.13,
    "IQ4_NL": 0.12,
    "IQ4_XS": 0.13,
    "MXFP4": 0.20,
    "Q3_K": 0.25,
    "Q2_K": 0.50,
}


@pytest.mark.parametrize("type_name", BOUNDS)
def test_encoder_is_close_and_layout_is_right(type_name: str) -> None:
    rng = np.random.default_rng(7)
    values = rng.standard_normal((3, 16, 512), np.float32)
    # Every sub-block gets a size and place of its own, so that mixed-up scales show.
    values *= rng.uniform(0.5, 2, (3, 16, 32)).astype(np.float32).repeat(16, axis=2)
    data = quantize(values, type_name)
    _, block, block_bytes = TYPES[TYPE_IDS[type_name]]
    assert data.shape == (3, 16, 512 // block * block_bytes)
    back = dequantize(data.reshape(-1), type_name, values.shape)
    error = np.sqrt(np.mean((back - values) ** 2) / np.mean(values**2))
    assert error <= BOUNDS[type_name]
    if BOUNDS[type_name]:
        assert error > BOUNDS[type_name] / 8  # the bound says something


@pytest.mark.parametrize("type_name", BOUNDS)
def test_zero_and_constant_rows(type_name: str) -> None:
    values = np.zeros((2, 256), np.float32)
    values[1] = -0.5
    back = dequantize(quantize(values, type_name).reshape(-1), type_name, values.shape)
    assert (back[0] == 0).all()
    assert np.allclose(back[1], -0.5, rtol=0.01)
