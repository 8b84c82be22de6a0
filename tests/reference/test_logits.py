"""The CPU engine against Hugging Face transformers in float32: log-probabilities and greedy text.

The reference of a quantised file is the same model on the exactly dequantised weights, so that
only the engine's own rounding (8-bit activations) is measured. Bounds: the project's accuracy
table in README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kt_async.ffi import structs
from kt_async.ffi.host import ISA_NAMES, query_host
from kt_async.model.spec import ModelSpec
from tests.reference.checkpoints import (
    QWEN2,
    QWEN3,
    exact_model,
    hf_greedy,
    hf_logprobs,
    make_checkpoint,
)
from tests.reference.harness import DirectEngine, log_softmax, mean_kl

VOCABULARY = 512
# Mean KL(exact || engine) over a 700-token prompt, nats.
KL_LIMITS = {
    "F16": 1e-3,
    "BF16": 1e-3,
    "Q8_0": 5e-3,
    "Q4_0": 1e-2,
    "Q4_K": 1e-2,
    "Q5_K": 1e-2,
    "Q6_K": 1e-2,
    "IQ4_XS": 1e-2,
    "Q3_K": 1e-2,
    "Q2_K": 1e-2,
}


def prompt(length: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, ModelSpec], Path]:
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(type_name: str, spec: ModelSpec) -> Path:
        path = folder / f"{spec.name}-{type_name}.gguf"
        return path if path.exists() else make_checkpoint(path, type_name, spec)

    return make


@cache
def reference(path: Path) -> Any:
    return exact_model(path)


@cache
def exact(path: Path, length: int) -> npt.NDArray[np.float64]:
    return hf_logprobs(reference(path), prompt(length))


def engine_logprobs(path: Path, length: int, **options: Any) -> npt.NDArray[np.float64]:
    engine = DirectEngine(path, **options)
    try:
        return log_softmax(engine.prompt_logits(prompt(length)))
    finally:
        engine.close()


@pytest.mark.parametrize("spec", [QWEN3, QWEN2], ids=lambda s: s.architecture)
@pytest.mark.parametrize("chunk_size", [7, 64, 1024])
@pytest.mark.parametrize("length", [7, 130, 700])
def test_f32_log_probabilities(
    checkpoint: Callable[..., Path], spec: ModelSpec, length: int, chunk_size: int
) -> None:
    path = checkpoint("F32", spec)
    ours = engine_logprobs(path, length, chunk_size=chunk_size)
    assert np.abs(ours - exact(path, length)).max() <= 2e-3


@pytest.mark.parametrize("isa", query_host().isas)
def test_f32_on_every_isa(checkpoint: Callable[..., Path], isa: str) -> None:
    path = checkpoint("F32", QWEN3)
    ours = engine_logprobs(path, 130, isa=ISA_NAMES.index(isa))
    assert np.abs(ours - exact(path, 130)).max() <= 2e-3


@pytest.mark.parametrize("type_name", KL_LIMITS)
def test_quantised_kl(checkpoint: Callable[..., Path], type_name: str) -> None:
    path = checkpoint(type_name, QWEN3)
    kl = mean_kl(exact(path, 700), engine_logprobs(path, 700))
    print(f"KL {type_name}: {kl:.2e}")
    assert kl <= KL_LIMITS[type_name]


@pytest.mark.parametrize("kv_type", [structs.KT_KV_F16, structs.KT_KV_BF16])
def test_half_precision_kv(checkpoint: Callable[..., Path], kv_type: int) -> None:
    path = checkpoint("F32", QWEN3)
    kl = mean_kl(exact(path, 700), engine_logprobs(path, 700, kv_type=kv_type))
    assert kl <= {structs.KT_KV_F16: 1e-4, structs.KT_KV_BF16: 2e-3}[kv_type]


@pytest.mark.parametrize("spec", [QWEN3, QWEN2], ids=lambda s: s.architecture)
def test_greedy_text_is_identical(checkpoint: Callable[..., Path], spec: ModelSpec) -> None:
    path = checkpoint("F32", spec)
    prompts = [prompt(n, seed=n) for n in (3, 21, 64)]
    engine = DirectEngine(path, max_batch_size=3)
    try:
        ours = engine.generate(prompts, 16)
    finally:
        engine.close()
    assert ours == [hf_greedy(reference(path), p, 16) for p in prompts]


@pytest.mark.parametrize("type_name", ["F32", "BF16", "Q8_0", "Q4_K"])
def test_text_alone_equals_text_in_company(checkpoint: Callable[..., Path], type_name: str) -> None:
    """Bit-identical arithmetic whatever the batch, the chunks, and after preemption."""
    path = checkpoint(type_name, QWEN3)
    prompts = [prompt(5 + 23 * i, seed=i) for i in range(8)]
    results = []
    for options in (
        {"max_batch_size": 1, "chunk_size": 512},
        {"max_batch_size": 8, "chunk_size": 16},
        {"max_batch_size": 8, "chunk_size": 100, "num_pages": 12},
    ):
        engine = DirectEngine(path, max_len=384, **options)
        try:
            results.append(engine.generate(prompts, 40))
        finally:
            engine.close()
    assert results[0] == results[1] == results[2]
