"""--load_format dummy: shapes without files, weights of noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.synthetic import write_random_gguf
from kt_async import cli, serve
from kt_async.config import Config
from kt_async.demo import DEMO_SPEC, demo_model_path
from kt_async.errors import ConfigError
from kt_async.model.dummy import dummy_from_spec, open_dummy
from kt_async.model.spec import spec_from_gguf
from kt_async.model.tensors import check_tensors
from kt_async.weights.source import open_model

SPEC = replace(DEMO_SPEC, vocab_size=1000)
QWEN3 = {
    "model_type": "qwen3_moe",
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "vocab_size": 1000,
    "rms_norm_eps": 1e-6,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rope_theta": 1e6,
}


@pytest.fixture
def header(tmp_path: Path) -> Path:
    """A GGUF cut off behind its header."""
    path = tmp_path / "m.gguf"
    write_random_gguf(path, SPEC, "Q4_K_M", layers=2)
    whole = path.read_bytes()
    first = min(info.offset for info in open_model(path).tensors.values())
    path.write_bytes(whole[:first])
    return path


def test_a_header_is_enough(header: Path) -> None:
    with pytest.raises(ConfigError, match="truncated"):
        open_model(header)
    files = open_dummy(header, None)
    check_tensors(spec_from_gguf(files), files)
    assert files.total_bytes == sum(info.num_bytes for info in files.tensors.values())
    for name, info in files.tensors.items():
        assert files.data(name).nbytes == info.num_bytes


def test_released_memory_is_given_back() -> None:
    files = dummy_from_spec(SPEC, "Q8_0", Path("shape"))
    name = "blk.0.ffn_up_exps.weight"
    assert files.data(name) is files.data(name)
    assert files.address(name) == files.data(name).ctypes.data
    experts = files.data(name).reshape(SPEC.num_experts, -1)
    assert not (experts[0] == experts[1]).all()
    files.release(name)
    assert files.data(name).nbytes == files.tensors[name].num_bytes


def test_norms_are_sane() -> None:
    files = dummy_from_spec(SPEC, "Q8_0", Path("shape"))
    norm = files.data("output_norm.weight").view(np.float32)
    assert 0.5 < norm.mean() < 1.5
    assert norm.std() > 0


def test_a_config_folder_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    config = cli.parse(["--load_format", "dummy", "--model_path", str(tmp_path)], {})
    ready = serve.prepare(replace(config, device="cpu"))
    assert ready.model.spec.num_experts == 8
    assert ready.model.main_type == "Q4_K"
    assert ready.tokenizer.decode(ready.tokenizer.encode("Hello")) == "Hello"
    ready.model.files.close()


def test_what_cannot_be_made_up_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        open_dummy(None, tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        cli.parse(["--load_format", "dummy", "--gguf_path", str(tmp_path / "none.gguf")], {})
    with pytest.raises(ConfigError, match="--gguf_path with the weights is missing"):
        cli.parse(["--model_path", str(tmp_path)], {})


def test_the_demo_shape_is_the_default() -> None:
    ready = serve.prepare(Config(load_format="dummy", device="cpu"))
    assert ready.model.spec.name == "kt-async-demo"
    assert ready.model.files.path == demo_model_path()
    ready.model.files.close()
