"""ModelSpec from GGUF keys and from config.json, and the tensors that follow from it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from kt_async.demo import DEMO_SPEC
from kt_async.errors import ConfigError
from kt_async.model.hf_config import load_spec, spec_from_hf
from kt_async.model.spec import ModelSpec, RopeSpec, spec_from_gguf
from kt_async.model.synthetic import metadata_from_spec, random_tensors
from kt_async.model.tensors import check_tensors, expected_tensors
from kt_async.weights.source import TYPES, ModelFiles, TensorInfo, open_model
from kt_async.weights.writer import write_gguf

QWEN2 = replace(
    DEMO_SPEC,
    architecture="qwen2moe",
    qk_norm=False,
    qkv_bias=True,
    norm_topk=False,
    num_shared_experts=1,
    shared_intermediate_size=512,
)
DEEPSEEK = ModelSpec(
    architecture="deepseek2",
    name="small",
    num_layers=3,
    hidden_size=256,
    vocab_size=512,
    max_context=4096,
    num_heads=4,
    num_kv_heads=4,
    head_dim=96,
    v_head_dim=64,
    rms_eps=1e-6,
    rope=RopeSpec(
        theta=10000.0,
        dim=32,
        neox=False,
        scaling="yarn",
        factor=40.0,
        original_context=4096,
        yarn_log_multiplier=0.1 * 0.707,
    ),
    intermediate_size=512,
    num_experts=8,
    top_k=2,
    moe_intermediate_size=256,
    num_shared_experts=2,
    shared_intermediate_size=512,
    num_dense_layers=1,
    norm_topk=False,
    q_lora_rank=128,
    kv_lora_rank=64,
    nope_head_dim=64,
    rope_head_dim=32,
    extra={"router_bias": False, "absorbed": False},
)
V3 = replace(
    DEEPSEEK,
    scoring="sigmoid",
    norm_topk=True,
    expert_scale=2.5,
    expert_groups=4,
    expert_groups_used=2,
    extra={"router_bias": True, "absorbed": True},
)
LITE = replace(DEEPSEEK, q_lora_rank=0)
SPECS = {"qwen3moe": DEMO_SPEC, "qwen2moe": QWEN2, "v2": DEEPSEEK, "v3": V3, "lite": LITE}


def files_of(spec: ModelSpec, **changes: Any) -> Any:
    """Return headers without data: what spec_from_gguf and check_tensors look at."""
    files = ModelFiles.__new__(ModelFiles)
    metadata = metadata_from_spec(spec)
    for key, value in changes.items():
        name = key.replace("__", ".")
        metadata[name if name in metadata else f"{spec.architecture}.{name}"] = value
    files.metadata = MappingProxyType({k: v for k, v in metadata.items() if v is not None})
    files.paths = (Path("m.gguf"),)
    files.tensors = {
        name: TensorInfo(name, 0, TYPES[0][0], shape, Path("m.gguf"), 0, 4)
        for name, shape in expected_tensors(spec).items()
    }
    return files


@pytest.mark.parametrize("name", SPECS)
def test_spec_survives_the_way_through_a_file(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    path = tmp_path / "m.gguf"
    tensors = random_tensors(spec, lambda *_: "F16", seed=3, tile_bytes=1 << 14)
    write_gguf(path, metadata_from_spec(spec), tensors)
    files = open_model(path)
    got = spec_from_gguf(files)
    check_tensors(got, files)
    # The file holds 32-bit floats.
    assert math.isclose(got.rope.yarn_log_multiplier, spec.rope.yarn_log_multiplier, rel_tol=1e-6)
    rope = replace(got.rope, yarn_log_multiplier=spec.rope.yarn_log_multiplier)
    assert replace(got, rms_eps=spec.rms_eps, rope=rope) == spec


def test_old_deepseek_file_without_absorbed_projections_or_gating() -> None:
    spec = spec_from_gguf(files_of(LITE, expert_gating_func=None, attention__q_lora_rank=None))
    assert (spec.q_lora_rank, spec.scoring, spec.extra["absorbed"]) == (0, "softmax", False)
    spec = spec_from_gguf(files_of(V3, expert_gating_func=None))
    assert spec.scoring == "sigmoid"  # a selection bias exists only with sigmoid scores


def test_missing_keys_come_from_tensors() -> None:
    changes = {"expert_feed_forward_length": None, "expert_shared_feed_forward_length": None}
    spec = spec_from_gguf(files_of(QWEN2, **changes))
    assert (spec.moe_intermediate_size, spec.shared_intermediate_size) == (256, 512)
    files = files_of(DEMO_SPEC)
    del files.tensors["output.weight"]
    spec = spec_from_gguf(files)
    assert spec.tied_embeddings
    check_tensors(spec, files)


def test_qwen_yarn_scales_cos_and_sin() -> None:
    changes = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 4.0,
        "rope__scaling__original_context_length": 32768,
    }
    rope = spec_from_gguf(files_of(DEMO_SPEC, **changes)).rope
    assert rope.attn_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert (rope.scaling, rope.factor, rope.original_context) == ("yarn", 4.0, 32768)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"block_count": None}, "'qwen3moe.block_count' is missing"),
    "zero": ({"expert_count": 0}, "'qwen3moe.expert_count' is 0, expected a whole number"),
    "text": ({"embedding_length": "x"}, "'qwen3moe.embedding_length' is x"),
    "bool": ({"attention__head_count": True}, "is True"),
    "heads": ({"attention__head_count_kv": 3}, "4 heads of 3 kv"),
    "top_k": ({"expert_used_count": 17}, "17 of 16 experts per token"),
    "layers": ({"block_count": 5000}, "is 5000, expected a whole number from 1 to 1024"),
    "eps": ({"attention__layer_norm_rms_epsilon": 0.0}, "expected a number above 0"),
    "nan": ({"rope__freq_base": math.nan}, "expected a finite number"),
    "scaling": ({"rope__scaling__type": "longrope"}, "'longrope', supported are none, linear"),
    "per layer": ({"attention__head_count_kv": [2, 4]}, "is [2, 4]"),
    "architecture": (
        {"general__architecture": "llama"},
        "architecture 'llama' is not supported; supported are qwen3moe",
    ),
    "nothing": ({"general__architecture": ""}, "no architecture is not supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_impossible_values_are_one_sentence(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(ConfigError) as caught:
        spec_from_gguf(files_of(DEMO_SPEC, **changes))
    sentence = str(caught.value)
    assert sentence.startswith("m.gguf: ")
    assert message in sentence


def test_missing_and_misshaped_tensors_are_named() -> None:
    files = files_of(DEMO_SPEC)
    info = files.tensors.pop("blk.2.attn_k.weight")
    with pytest.raises(ConfigError, match=r"tensor 'blk\.2\.attn_k\.weight' is missing"):
        check_tensors(DEMO_SPEC, files)
    files.tensors[info.name] = replace(info, shape=(128, 512))
    with pytest.raises(ConfigError, match=r"has shape 128 x 512, but .* need 128 x 256"):
        check_tensors(DEMO_SPEC, files)


def test_vector_may_be_a_matrix_of_one_row(caplog: pytest.LogCaptureFixture) -> None:
    files = files_of(QWEN2)
    name = "blk.0.ffn_gate_inp_shexp.weight"
    files.tensors[name] = replace(files.tensors[name], shape=(1, 256))
    files.tensors["extra.weight"] = replace(files.tensors[name], name="extra.weight")
    check_tensors(QWEN2, files)
    assert "1 tensors are not part of this architecture" in caplog.text


# ---- Hugging Face configs ----

QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "head_dim": 128,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "vocab_size": 151936,
}


def test_qwen3_config() -> None:
    spec = spec_from_hf(QWEN3_30B, "Qwen3-30B-A3B")
    assert (spec.architecture, spec.num_layers, spec.head_dim) == ("qwen3moe", 48, 128)
    assert (spec.num_experts, spec.top_k, spec.moe_intermediate_size) == (128, 8, 768)
    assert spec.qk_norm
    assert not spec.qkv_bias
    assert spec.rope == RopeSpec(theta=1e6, dim=128)
    assert sum(math.prod(shape) for shape in expected_tensors(spec).values()) == 30_532_122_624
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    spec = spec_from_hf(QWEN3_30B | {"rope_scaling": scaled})
    assert (spec.max_context, spec.rope.scaling) == (131072, "yarn")
    assert spec.rope.attn_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_directory_overrides_what_the_file_says(tmp_path: Path) -> None:
    files = files_of(DEMO_SPEC, rope__freq_base=5.0)
    assert load_spec(files).rope.theta == 5.0
    assert load_spec(files, tmp_path).rope.theta == 5.0  # no config.json there
    del files.tensors["output.weight"]
    config = QWEN3_30B | {"rope_theta": 7.0, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = load_spec(files, tmp_path)
    assert (spec.rope.theta, spec.name) == (7.0, tmp_path.name)
    assert (spec.vocab_size, spec.tied_embeddings) == (DEMO_SPEC.vocab_size, True)
    with pytest.raises(ConfigError, match="describes qwen3moe, but m.gguf holds qwen2moe"):
        load_spec(files_of(QWEN2), tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json: holds list, expected an object"):
        load_spec(files, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"decoder_sparse_step": 2}, "'decoder_sparse_step' is not 1"),
        ({"mlp_only_layers": [3]}, "only leading layers may be dense"),
        ({"use_sliding_window": True}, "'use_sliding_window' is true"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic', supported are"),
        ({"rope_scaling": "yarn"}, "'rope_scaling' is yarn, expected an object"),
        ({"mlp_only_layers": 3}, "only leading layers may be dense"),
        ({"norm_topk_prob": "no"}, "'norm_topk_prob' is no, expected true or false"),
        ({"num_experts": None}, "'num_local_experts' is missing"),
    ],
)
def test_unsupported_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"x/config\.json: ") as caught:
        spec_from_hf(QWEN3_30B | change, "x")
    assert message in str(caught.value)
