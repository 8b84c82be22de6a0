"""The random demo model: deterministic, quick, atomic, and a valid model of its spec."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from kt_async import demo
from kt_async.errors import ConfigError
from kt_async.model.spec import spec_from_gguf
from kt_async.model.tensors import check_tensors
from kt_async.weights.source import open_model


@pytest.fixture(autouse=True)
def _without_the_packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGED", tmp_path / "nothing" / "demo.gguf")


def test_demo_model_is_valid_and_quick(tmp_path: Path) -> None:
    start = time.perf_counter()
    path = demo.demo_model_path(tmp_path)
    took = time.perf_counter() - start
    files = open_model(path)
    spec = spec_from_gguf(files)
    check_tensors(spec, files)
    assert replace(spec, rms_eps=1e-6) == demo.DEMO_SPEC
    assert {info.type_name for info in files.tensors.values()} == {"F32", "Q4_K", "Q6_K", "Q8_0"}
    assert len(files.metadata["tokenizer.ggml.tokens"]) == spec.vocab_size
    assert took < 2
    assert list(path.parent.iterdir()) == [path]
    before = path.stat().st_mtime_ns
    assert demo.demo_model_path(tmp_path) == path
    assert path.stat().st_mtime_ns == before


def test_demo_model_is_deterministic(tmp_path: Path) -> None:
    one, two, other = (tmp_path / name for name in "abc")
    demo.write_demo_model(one)
    demo.write_demo_model(two)
    demo.write_demo_model(other, seed=2)
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()


def test_demo_weights_have_sane_scales(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    demo.write_demo_model(path)
    files = open_model(path)
    for name in ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_down_exps.weight", "output.weight"):
        info = files.tensors[name]
        values = quants.dequantize(files.data(name), GGMLQuantizationType(info.type))
        gain = 3 if name == "output.weight" else 1
        assert np.isfinite(values).all()
        assert abs(values.std() * info.shape[-1] ** 0.5 - gain) < 0.05 * gain
        assert abs(values.mean()) < 0.05 * values.std()


def test_unwritable_cache_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="demo model cannot be written"):
        demo.demo_model_path(tmp_path / "file")
