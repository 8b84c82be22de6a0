"""ModelSpec from a Hugging Face directory, for `--model_path`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kt_async.errors import ConfigError
from kt_async.model.fields import MAX_CONTEXT, MAX_EXPERTS, MAX_LAYERS, Fields
from kt_async.model.spec import (
    SUPPORTED,
    ModelSpec,
    RopeSpec,
    check_spec,
    spec_from_gguf,
    yarn_magnitude,
)
from kt_async.text.hf_files import read_json
from kt_async.weights.source import ModelFiles

# Hugging Face model_type -> GGUF architecture; Moonlight and Kimi-K2 are DeepSeek-V3 in all but
# name.
_TYPES = {
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "kimi_k2": "deepseek2",
}


def load_spec(files: ModelFiles, model_path: Path | None = None) -> ModelSpec:
    """Return the spec of an opened model.

    model_path: directory whose config.json, if it has one, replaces the GGUF's own settings; what
    only tensors tell (vocabulary rows, tied embeddings, layout) still comes from the files.
    Raises ConfigError, also when the two describe different architectures.
    """
    config = read_json(model_path / "config.json") if model_path else {}
    if model_path is None or not config:
        return spec_from_gguf(files)
    spec = spec_from_hf(config, str(model_path))
    stated = files.metadata.get("general.architecture")
    if stated != spec.architecture:
        raise ConfigError(
            f"{model_path}/config.json describes {spec.architecture}, "
            f"but {files.path} holds {stated}."
        )
    embedding = files.tensors.get("token_embd.weight")
    if embedding is None:
        raise ConfigError(f"{files.path}: tensor 'token_embd.weight' is missing.")
    extra = dict(spec.extra)
    if "absorbed" in extra:
        extra["absorbed"] = "blk.0.attn_k_b.weight" in files.tensors
    return replace(
        spec,
        name=model_path.name,
        vocab_size=embedding.shape[0],
        tied_embeddings="output.weight" not in files.tensors,
        extra=extra,
    )


def spec_from_hf(config: Mapping[str, Any], name: str = "") -> ModelSpec:
    """Read the spec from a Hugging Face config.json, already parsed.

    name: what to call the model and the file in messages. Raises ConfigError as spec_from_gguf.
    """
    source = f"{name or 'model'}/config.json"
    model_type = str(config.get("model_type", ""))
    architecture = _TYPES.get(model_type)
    if architecture is None:
        raise ConfigError(
            f"{source}: model_type '{model_type}' is not supported; supported are {SUPPORTED}."
        )
    f = Fields(source, config)
    heads = f.count("num_attention_heads")
    common: dict[str, Any] = {
        "architecture": architecture,
        "name": name or str(config.get("_name_or_path") or model_type),
        "num_layers": f.count("num_hidden_layers", high=MAX_LAYERS),
        "hidden_size": f.count("hidden_size"),
        "vocab_size": f.count("vocab_size"),
        "num_heads": heads,
        "rms_eps": f.positive("rms_norm_eps"),
        "intermediate_size": f.count("intermediate_size", 0, low=0),
        "moe_intermediate_size": f.count("moe_intermediate_size"),
        "top_k": f.count("num_experts_per_tok", high=MAX_EXPERTS),
        "tied_embeddings": f.flag("tie_word_embeddings", default=False),
    }
    build = _deepseek_from_hf if architecture == "deepseek2" else _qwen_from_hf
    rest = build(f, heads)
    rope: RopeSpec = rest["rope"]
    context = f.count("max_position_embeddings", high=MAX_CONTEXT)
    if rope.scaling == "yarn":  # hand-edited configs keep the unscaled length there
        context = max(context, int(rope.original_context * rope.factor))
    return check_spec(source, ModelSpec(**common, **rest, max_context=context))


def _qwen_from_hf(f: Fields, heads: int) -> dict[str, Any]:
    qwen2 = f.text("model_type") == "qwen2_moe"
    if f.count("decoder_sparse_step", 1) != 1:
        raise f.error("decoder_sparse_step", "is not 1, which is not supported")
    if f.flag("use_sliding_window", default=False):
        raise f.error("use_sliding_window", "is true, which is not supported")
    dense = f.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or set(dense) != set(range(len(dense))):
        raise f.error("mlp_only_layers", f"is {dense}; only leading layers may be dense")
    head_dim = f.count("head_dim", f.count("hidden_size") // heads)
    experts = "num_experts" if f.has("num_experts") else "num_local_experts"
    return {
        "num_kv_heads": f.count("num_key_value_heads", heads),
        "head_dim": head_dim,
        "v_head_dim": head_dim,
        "rope": _rope_from_hf(f, head_dim, neox=True),
        "num_experts": f.count(experts, high=MAX_EXPERTS),
        "num_shared_experts": int(qwen2),
        "shared_intermediate_size": f.count("shared_expert_intermediate_size") if qwen2 else 0,
        "num_dense_layers": len(dense),
        "qk_norm": not qwen2,
        "qkv_bias": f.flag("qkv_bias" if qwen2 else "attention_bias", default=qwen2),
        "norm_topk": f.flag("norm_topk_prob", default=False),
    }


def _deepseek_from_hf(f: Fields, heads: int) -> dict[str, Any]:
    if f.count("moe_layer_freq", 1) != 1:
        raise f.error("moe_layer_freq", "is not 1, which is not supported")
    v3 = f.text("model_type") != "deepseek_v2"
    scoring = f.text("scoring_func", "sigmoid" if v3 else "softmax")
    if scoring not in ("softmax", "sigmoid"):
        raise f.error("scoring_func", f"is '{scoring}', supported are softmax, sigmoid")
    method = f.text("topk_method", "noaux_tc" if v3 else "greedy")
    nope, rope_dim = f.count("qk_nope_head_dim"), f.count("qk_rope_head_dim")
    shared = f.count("n_shared_experts", 0, low=0, high=MAX_EXPERTS)
    grouped = method != "greedy"
    return {
        "num_kv_heads": heads,
        "head_dim": nope + rope_dim,
        "v_head_dim": f.count("v_head_dim"),
        "rope": _rope_from_hf(f, rope_dim, neox=False),
        "num_experts": f.count("n_routed_experts", high=MAX_EXPERTS),
        "num_shared_experts": shared,
        "shared_intermediate_size": shared * f.count("moe_intermediate_size"),
        "num_dense_layers": f.count("first_k_dense_replace", 0, low=0, high=MAX_LAYERS),
        "scoring": scoring,
        "norm_topk": f.flag("norm_topk_prob", default=v3),
        "expert_scale": f.number("routed_scaling_factor", 1.0),
        "expert_groups": f.count("n_group", 0, low=0) if grouped else 0,
        "expert_groups_used": f.count("topk_group", 0, low=0) if grouped else 0,
        "q_lora_rank": f.count("q_lora_rank", 0, low=0),
        "kv_lora_rank": f.count("kv_lora_rank"),
        "nope_head_dim": nope,
        "rope_head_dim": rope_dim,
        "extra": {"router_bias": method == "noaux_tc", "absorbed": False},
    }


def _rope_from_hf(f: Fields, dim: int, *, neox: bool) -> RopeSpec:
    """Read rope_theta with rope_scaling, or the newer rope_parameters that hold both."""
    values = {"rope_theta": f.values.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        part = f.values.get(key) or {}
        if not isinstance(part, Mapping):
            raise f.error(key, f"is {part}, expected an object")
        values |= part
    r = Fields(f.source, values)
    theta = r.positive("rope_theta", 10000.0)
    scaling = r.text("rope_type", r.text("type", "default"))
    if scaling == "default":
        return RopeSpec(theta, dim, neox)
    if scaling not in ("linear", "yarn"):
        raise r.error("rope_type", f"is '{scaling}', supported are default, linear, yarn")
    factor = r.positive("factor")
    if scaling == "linear":
        return RopeSpec(theta, dim, neox, scaling, factor)
    context = f.count("max_position_embeddings", high=MAX_CONTEXT)
    mscale, all_dim = r.number("mscale", 0.0), r.number("mscale_all_dim", 0.0)
    if mscale and all_dim:
        attn = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dim)
    else:
        attn = yarn_magnitude(factor, 1.0)
    return RopeSpec(
        theta=theta,
        dim=dim,
        neox=neox,
        scaling=scaling,
        factor=factor,
        original_context=r.count("original_max_position_embeddings", context, high=MAX_CONTEXT),
        attn_factor=r.positive("attention_factor", attn),
        beta_fast=r.positive("beta_fast", 32.0),
        beta_slow=r.positive("beta_slow", 1.0),
        yarn_log_multiplier=0.1 * all_dim,
    )
