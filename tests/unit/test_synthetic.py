"""Random models: block scales, type recipes, real sizes, and a file that opens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from bench import synthetic
from kt_async.demo import DEMO_SPEC
from kt_async.model.spec import spec_from_gguf
from kt_async.model.synthetic import (
    _SCALES,
    QUANTS,
    fitting_type,
    random_blocks,
    random_tensors,
    recipe_for,
)
from kt_async.model.tensors import check_tensors
from kt_async.text.tokenizer import load_tokenizer
from kt_async.weights.source import TYPE_IDS, TYPES, open_model


@pytest.mark.parametrize("type_name", [*_SCALES, "MXFP4", "F32", "F16", "BF16"])
def test_blocks_have_the_wanted_spread(type_name: str) -> None:
    rng = np.random.default_rng(0)
    _, block, block_bytes = TYPES[TYPE_IDS[type_name]]
    blocks = random_blocks(type_name, 65536 // block, 0.05, rng)
    assert blocks.shape[1] == block_bytes
    if type_name == "F32":
        values = blocks.view(np.float32)
    else:
        values = quants.dequantize(blocks, GGMLQuantizationType[type_name])
    assert np.isfinite(values).all()
    # MXFP4 has powers of two for scales and nothing else to turn.
    assert values.std() == pytest.approx(0.05, rel=0.5 if type_name == "MXFP4" else 0.03)
    assert abs(values.mean()) < 0.004
    with pytest.raises(ValueError, match="cannot make random I32"):
        random_blocks("I32", 1, 1.0, rng)


def test_types_that_do_not_divide_a_row_are_replaced() -> None:
    assert fitting_type("Q4_K", 256) == "Q4_K"
    assert fitting_type("Q4_K", 128) == "Q5_0"
    assert fitting_type("Q6_K", 1408) == "Q8_0"
    assert fitting_type("Q2_K", 128) == "IQ4_NL"
    assert fitting_type("Q8_0", 20) == "F16"


# Sizes of the published files of these shapes, in GB.
@pytest.mark.parametrize(
    ("shape", "quant", "size"),
    [
        ("qwen3-30b-a3b", "Q4_K_M", 18.6),
        ("qwen3-30b-a3b", "BF16", 61.1),
        ("qwen3-235b-a22b", "Q4_K_M", 142),
        ("deepseek-v2-lite", "Q4_K_M", 10.4),
        ("deepseek-v3", "Q8_0", 713),
    ],
)
def test_shapes_have_the_real_sizes(shape: str, quant: str, size: float) -> None:
    tensors = random_tensors(synthetic.SHAPES[shape], recipe_for(quant), 1, 1 << 14)
    assert sum(tensor.num_bytes for tensor in tensors) / 1e9 == pytest.approx(size, rel=0.005)


def test_mixed_recipe_gives_half_of_the_layers_more_bits() -> None:
    recipe = recipe_for("Q4_K_M")
    down = [recipe(f"blk.{i}.ffn_down_exps.weight", i, 48) for i in range(48)]
    assert (down.count("Q6_K"), down.count("Q4_K")) == (24, 24)
    assert recipe("blk.9.ffn_up_exps.weight", 9, 48) == "Q4_K"
    assert recipe("blk.9.ffn_gate_inp.weight", 9, 48) == "F32"
    assert recipe("output.weight", -1, 48) == "Q6_K"
    with pytest.raises(ValueError, match="quantisation 'Q9' is unknown"):
        recipe_for("Q9")


@pytest.mark.parametrize("quant", QUANTS)
def test_written_file_is_a_valid_model(quant: str, tmp_path: Path) -> None:
    spec = replace(DEMO_SPEC, vocab_size=1000)
    path = tmp_path / "m.gguf"
    size = synthetic.write_random_gguf(path, spec, quant, layers=2, seed=3)
    files = open_model(path)
    assert size == files.total_bytes
    got = spec_from_gguf(files)
    check_tensors(got, files)
    assert got.num_layers == 2
    tokenizer = load_tokenizer(files)
    assert tokenizer.vocab_size == 1000
    assert tokenizer.decode(tokenizer.encode("Hello, it's me")) == "Hello, it's me"
    experts = files.data("blk.0.ffn_up_exps.weight").reshape(spec.num_experts, -1)
    assert not (experts[0] == experts[1]).all()


def test_unknown_shape_and_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="shape 'x' is unknown"):
        synthetic.write_random_gguf(tmp_path / "m", "x")
    usage = type("Usage", (), {"free": 1 << 30})
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"needs 18\.6 GB, 1\.1 GB are free"):
        synthetic.write_random_gguf(tmp_path / "m", "qwen3-30b-a3b")
    assert synthetic.main([str(tmp_path / "m")]) == 2
    assert not list(tmp_path.iterdir())
