"""The reference models themselves: names, layout and size of the numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from kt_async.model.hf_config import spec_from_hf
from kt_async.model.spec import ModelSpec, spec_from_gguf
from kt_async.text.tokenizer import load_tokenizer
from kt_async.weights.source import open_model
from tests.reference import checkpoints
from tests.reference.hf_names import LAYER, OUTER, layer_name, to_hf

SPECS = {
    "qwen3moe": checkpoints.QWEN3,
    "qwen2moe": checkpoints.QWEN2,
    "deepseek2": checkpoints.DEEPSEEK2,
    "deepseek3": checkpoints.DEEPSEEK3,
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_f32_file_holds_the_models_weights_bit_for_bit(spec: ModelSpec, tmp_path: Path) -> None:
    weights = checkpoints.random_weights(spec, seed=1)
    model = checkpoints.hf_model(spec, weights)
    checkpoints.write_checkpoint(tmp_path / "m.gguf", spec, weights)
    exact = checkpoints.exact_model(tmp_path / "m.gguf")
    state, other = model.state_dict(), exact.state_dict()
    assert state.keys() == other.keys()
    for name, values in state.items():
        assert torch.equal(values, other[name]), name
    # The config of the rebuilt model says the same as the file's metadata.
    files = open_model(tmp_path / "m.gguf")
    from_file = spec_from_gguf(files)
    from_config = spec_from_hf(exact.config.to_dict(), spec.name)
    extra = {**from_config.extra}
    if extra:
        extra["absorbed"] = spec.extra["absorbed"]  # a matter of the file alone
    mscale = from_config.rope.yarn_log_multiplier
    assert mscale == pytest.approx(from_file.rope.yarn_log_multiplier)
    rope = replace(from_config.rope, yarn_log_multiplier=from_file.rope.yarn_log_multiplier)
    assert from_file == replace(from_config, extra=extra, rope=rope)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_names_agree_with_the_gguf_packages_table(spec: ModelSpec) -> None:
    architecture = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[spec.architecture]
    table = gguf.get_tensor_name_map(architecture, spec.num_layers)
    weights = checkpoints.random_weights(spec)
    state = to_hf(spec, weights)
    names = {OUTER[ours]: ours for ours in OUTER}
    for layer in range(spec.num_layers):
        for part in LAYER:
            names[f"model.layers.{layer}.{layer_name(spec, part)}"] = f"blk.{layer}.{part}"
    checked = [name for name in state if name in names]
    for name in checked:
        stem = name.removesuffix(".weight").removesuffix("_bias").removesuffix(".bias")
        expected = names[name].removesuffix(".weight").removesuffix(".bias")
        assert table.get_name(stem) == expected, name
    assert len(checked) >= len(state) - 2 * spec.num_layers  # all but the joined tensors
    # gate comes before up in the joined tensor: the model splits it in that order.
    joined = state["model.layers.2.mlp.experts.gate_up_proj"]
    half = joined.shape[1] // 2
    assert np.array_equal(joined[:, :half], weights["blk.2.ffn_gate_exps.weight"])


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_quantised_file_is_close_to_the_model(type_name: str, tmp_path: Path) -> None:
    spec = checkpoints.QWEN3
    path = checkpoints.make_checkpoint(tmp_path / "m.gguf", type_name)
    files = open_model(path)
    types = {info.type_name for info in files.tensors.values()}
    assert types == {"F32", type_name}
    assert files.tensors["blk.0.ffn_gate_inp.weight"].type_name == "F32"
    ids = checkpoints.random_ids(64)
    whole = checkpoints.hf_logprobs(
        checkpoints.hf_model(spec, checkpoints.random_weights(spec)), ids
    )
    coarse = checkpoints.hf_logprobs(checkpoints.exact_model(path), ids)
    divergence = checkpoints.mean_kl(whole, coarse)
    # A wrong layout would give several nats.
    assert 0 < divergence < {"Q4_0": 1.0, "Q4_K": 1.0, "Q6_K": 0.2}.get(type_name, 0.05)


def test_logits_spread_and_routing_varies(tmp_path: Path) -> None:
    model = checkpoints.exact_model(checkpoints.make_checkpoint(tmp_path / "m.gguf"))
    ids = checkpoints.random_ids(130)
    logprobs = checkpoints.hf_logprobs(model, ids)
    assert logprobs.shape == (130, 512)
    assert np.allclose(np.exp(logprobs).sum(-1), 1)
    spread = logprobs.std(-1)
    assert 1.0 < spread.mean() < 4.0
    assert len(set(logprobs.argmax(-1).tolist())) > 40  # it does not say the same all the time
    norms = [values for name, values in model.state_dict().items() if "norm" in name]
    assert all(0.1 < float(p.std()) < 0.3 for p in norms)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_mixed_widths_fall_back_and_the_model_runs(spec: ModelSpec, tmp_path: Path) -> None:
    path = checkpoints.make_checkpoint(tmp_path / "m.gguf", "Q4_K", spec)
    types = {info.type_name for info in open_model(path).tensors.values()}
    assert types == {"F32", "Q4_K"} | ({"Q5_0"} if spec.extra.get("absorbed") else set())
    logprobs = checkpoints.hf_logprobs(checkpoints.exact_model(path), checkpoints.random_ids(40))
    assert np.isfinite(logprobs).all()
    assert 1.0 < logprobs.std(-1).mean() < 4.0


def test_greedy_continues_the_prompt(tmp_path: Path) -> None:
    model = checkpoints.exact_model(checkpoints.make_checkpoint(tmp_path / "m.gguf"))
    ids = checkpoints.random_ids(20)
    tokens = checkpoints.hf_greedy(model, ids, 5)
    rows = checkpoints.hf_logprobs(model, ids + tokens)[19:24]
    assert rows.argmax(-1).tolist() == tokens


def test_vocabulary_is_usable(tmp_path: Path) -> None:
    path = checkpoints.make_checkpoint(tmp_path / "m.gguf", "Q8_0")
    tokenizer = load_tokenizer(open_model(path))
    assert tokenizer.vocab_size == 512
    assert tokenizer.used_vocab_size == 259
    assert tokenizer.decode(tokenizer.encode("Grüße <|im_end|>")) == "Grüße <|im_end|>"
