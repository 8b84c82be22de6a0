"""ModelSpec: everything the engine needs to know about a model, whatever file it came from.

The only reader of foreign key names: GGUF metadata (`spec_from_gguf`) and Hugging Face's config
(`spec_from_hf`). Which tensors follow from a spec is in `model.tensors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kt_async.errors import ConfigError
from kt_async.weights.source import ModelFiles


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding: base, rotated dimensions and the scaling of the checkpoint."""

    theta: float
    dim: int
    neox: bool = True  # half-split pairs (Qwen); False = interleaved pairs (DeepSeek)
    scaling: str = "none"  # none | linear | yarn
    factor: float = 1.0
    original_context: int = 0
    attn_factor: float = 1.0  # multiplies cos and sin (YaRN)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    yarn_log_multiplier: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape and constants of one mixture-of-experts decoder."""

    architecture: str  # GGUF name: qwen3moe, qwen2moe, deepseek2
    name: str  # general.name, or the file's
    num_layers: int
    hidden_size: int
    vocab_size: int  # rows of the embedding
    max_context: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of q and k; v_head_dim when they differ
    rms_eps: float
    rope: RopeSpec
    intermediate_size: int  # dense MLP layers (0 when there are none)
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    num_shared_experts: int = 0
    shared_intermediate_size: int = 0
    num_dense_layers: int = 0  # leading layers without experts
    qk_norm: bool = False
    qkv_bias: bool = False
    scoring: str = "softmax"  # softmax | sigmoid
    norm_topk: bool = True
    expert_scale: float = 1.0
    expert_groups: int = 0
    expert_groups_used: int = 0
    v_head_dim: int = 0
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    nope_head_dim: int = 0
    rope_head_dim: int = 0
    tied_embeddings: bool = False
    # deepseek2: router_bias (the router has a selection bias), absorbed (attn_k_b and attn_v_b
    # instead of attn_kv_b)
    extra: Mapping[str, Any] = field(default_factory=dict)


# ---- reading foreign keys ----

# Hugging Face model_type -> GGUF architecture; Moonlight and Kimi-K2 are DeepSeek-V3 in all but
# name.
_HF_TYPES = {
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "kimi_k2": "deepseek2",
}
_SUPPORTED = ("qwen3moe", "qwen2moe", "deepseek2")
_LABELS = "qwen3moe (Qwen3-MoE), qwen2moe (Qwen2-MoE), deepseek2 (DeepSeek V2, V3, R1)"
_MAX_SIZE = 1 << 24  # of any dimension
_MAX_LAYERS = 1024
_MAX_EXPERTS = 4096


class _Fields:
    """Checked access to a mapping of foreign keys; every complaint names source and key."""

    def __init__(self, source: str, values: Mapping[str, Any], prefix: str = "") -> None:
        self.source = source
        self.values = values
        self.prefix = prefix

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.source}: '{self.prefix}{key}' {problem}.")

    def has(self, key: str) -> bool:
        return self.values.get(self.prefix + key) is not None

    def count(self, key: str, default: int | None = None, *, low: int = 1, high: int = 0) -> int:
        """Return an integer within low..high. Per-layer lists must hold one value throughout."""
        value = self.values.get(self.prefix + key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        high = high or _MAX_SIZE
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"is {value}, expected a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number."""
        value = self.values.get(self.prefix + key, default)
        if value is None and default is None:
            raise self.error(key, "is missing")
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"is {value}, expected a number")
        if not math.isfinite(value):
            raise self.error(key, f"is {value}, expected a finite number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """Return a number above zero."""
        value = self.number(key, default)
        if value <= 0:
            raise self.error(key, f"is {value:g}, expected a number above 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(self.prefix + key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, f"is {value}, expected true or false")
        return default if value is None else value

    def text(self, key: str, default: str = "") -> str:
        value = self.values.get(self.prefix + key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"is {value}, expected a string")
        return default if value is None else value


def spec_from_gguf(files: ModelFiles) -> ModelSpec:
    """Read the spec from GGUF metadata and, where files leave keys out, from tensor shapes.

    Raises ConfigError for an unsupported architecture and for missing or impossible values.
    """
    source = str(files.path)
    architecture = str(files.metadata.get("general.architecture", ""))
    if architecture not in _SUPPORTED:
        what = f"architecture '{architecture}' is" if architecture else "no architecture is"
        raise ConfigError(f"{source}: {what} not supported; supported are {_LABELS}.")
    embedding = files.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConfigError(f"{source}: tensor 'token_embd.weight' is missing or not a matrix.")
    f = _Fields(source, files.metadata, f"{architecture}.")
    heads = f.count("attention.head_count")
    hidden = f.count("embedding_length")
    common: dict[str, Any] = {
        "architecture": architecture,
        "name": _Fields(source, files.metadata).text("general.name") or files.path.stem,
        "num_layers": f.count("block_count", high=_MAX_LAYERS)
        - f.count("nextn_predict_layers", 0, low=0, high=8),  # speculative heads come last
        "hidden_size": hidden,
        "vocab_size": embedding.shape[0],
        "max_context": f.count("context_length", high=1 << 30),
        "num_heads": heads,
        "rms_eps": f.positive("attention.layer_norm_rms_epsilon"),
        "num_experts": f.count("expert_count", high=_MAX_EXPERTS),
        "top_k": f.count("expert_used_count", high=_MAX_EXPERTS),
        "tied_embeddings": "output.weight" not in files.tensors,
    }
    build = _deepseek_from_gguf if architecture == "deepseek2" else _qwen_from_gguf
    return _checked(source, ModelSpec(**common, **build(f, files, heads, hidden)))


def _qwen_from_gguf(f: _Fields, files: ModelFiles, heads: int, hidden: int) -> dict[str, Any]:
    qwen2 = files.metadata["general.architecture"] == "qwen2moe"
    head_dim = f.count("attention.key_length", hidden // heads)
    dense = f.count("feed_forward_length", 0, low=0)
    # Early Qwen2-MoE files carry neither expert width: the tensors know.
    experts = files.tensors.get("blk.0.ffn_gate_exps.weight")
    shared = files.tensors.get("blk.0.ffn_gate_shexp.weight")
    return {
        "num_kv_heads": f.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "v_head_dim": f.count("attention.value_length", head_dim),
        "rope": _rope_from_gguf(f, f.count("rope.dimension_count", head_dim), neox=True),
        "intermediate_size": dense,
        "moe_intermediate_size": f.count(
            "expert_feed_forward_length", experts.shape[-2] if experts else None
        ),
        "shared_intermediate_size": f.count(
            "expert_shared_feed_forward_length", shared.shape[0] if shared else None
        )
        if qwen2
        else 0,
        "num_shared_experts": int(qwen2),
        "qk_norm": not qwen2,
        "qkv_bias": qwen2,
        "norm_topk": not qwen2,  # fixed per family, no key exists
    }


def _deepseek_from_gguf(f: _Fields, files: ModelFiles, heads: int, _: int) -> dict[str, Any]:
    rope_dim = f.count("rope.dimension_count")
    # Files with absorbed projections (attn_k_b, attn_v_b) describe the compressed cache in
    # key_length and the real heads in key_length_mla; older files have only key_length.
    qk = f.count("attention.key_length_mla", f.count("attention.key_length"))
    v = f.count("attention.value_length_mla", f.count("attention.value_length"))
    width = f.count("expert_feed_forward_length")
    shared = f.count("expert_shared_count", 0, low=0, high=_MAX_EXPERTS)
    bias = any(name.endswith("exp_probs_b.bias") for name in files.tensors)
    gating = f.count("expert_gating_func", 2 if bias else 1, low=0, high=64) or (2 if bias else 1)
    if gating not in (1, 2):
        raise f.error("expert_gating_func", f"is {gating}, supported are 1 (softmax), 2 (sigmoid)")
    if qk <= rope_dim:
        raise f.error("rope.dimension_count", f"is {rope_dim}, expected less than {qk}")
    # Some writers store 0, some leave the key out, for models without query compression.
    direct = "blk.0.attn_q.weight" in files.tensors
    return {
        "num_kv_heads": heads,
        "head_dim": qk,
        "v_head_dim": v,
        "rope": _rope_from_gguf(f, rope_dim, neox=False),
        "intermediate_size": f.count("feed_forward_length", 0, low=0),
        "moe_intermediate_size": width,
        "num_shared_experts": shared,
        "shared_intermediate_size": shared * width,
        "num_dense_layers": f.count("leading_dense_block_count", 0, low=0, high=_MAX_LAYERS),
        "scoring": "sigmoid" if gating == 2 else "softmax",
        "norm_topk": f.flag("expert_weights_norm", default=False),
        "expert_scale": f.number("expert_weights_scale", 1.0) or 1.0,
        "expert_groups": f.count("expert_group_count", 0, low=0, high=_MAX_EXPERTS),
        "expert_groups_used": f.count("expert_group_used_count", 0, low=0, high=_MAX_EXPERTS),
        "q_lora_rank": 0 if direct else f.count("attention.q_lora_rank"),
        "kv_lora_rank": f.count("attention.kv_lora_rank"),
        "nope_head_dim": qk - rope_dim,
        "rope_head_dim": rope_dim,
        "extra": {
            "router_bias": bias,
            "absorbed": "blk.0.attn_k_b.weight" in files.tensors,
        },
    }


def _rope_from_gguf(f: _Fields, dim: int, *, neox: bool) -> RopeSpec:
    theta = f.positive("rope.freq_base", 10000.0)
    scaling = f.text("rope.scaling.type", "none")
    if scaling not in ("none", "linear", "yarn"):
        raise f.error("rope.scaling.type", f"is '{scaling}', supported are none, linear, yarn")
    if scaling == "none":
        return RopeSpec(theta, dim, neox)
    factor = f.positive("rope.scaling.factor", 1.0)
    if scaling == "linear":
        return RopeSpec(theta, dim, neox, scaling, factor)
    log_multiplier = f.number("rope.scaling.yarn_log_multiplier", 0.0)
    # With a log multiplier (DeepSeek) the magnitude goes into the softmax scale instead of cos
    # and sin; both mscale values of such checkpoints are equal and cancel there.
    attn = 1.0 if log_multiplier else _yarn_magnitude(factor, 1.0)
    return RopeSpec(
        theta=theta,
        dim=dim,
        neox=neox,
        scaling=scaling,
        factor=factor,
        original_context=f.count("rope.scaling.original_context_length", high=1 << 30),
        attn_factor=attn * f.positive("rope.scaling.attn_factor", 1.0),
        beta_fast=f.positive("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=f.positive("rope.scaling.yarn_beta_slow", 1.0),
        yarn_log_multiplier=log_multiplier,
    )


def _yarn_magnitude(factor: float, mscale: float) -> float:
    """YaRN's attention temperature (section 3.4 of the paper), as every checkpoint uses it."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def spec_from_hf(config: Mapping[str, Any], name: str = "") -> ModelSpec:
    """Read the spec from a Hugging Face config.json, already parsed.

    name: what to call the model and the file in messages. Raises ConfigError as spec_from_gguf.
    """
    source = f"{name or 'model'}/config.json"
    model_type = str(config.get("model_type", ""))
    architecture = _HF_TYPES.get(model_type)
    if architecture is None:
        raise ConfigError(
            f"{source}: model_type '{model_type}' is not supported; supported are {_LABELS}."
        )
    f = _Fields(source, config)
    heads = f.count("num_attention_heads")
    common: dict[str, Any] = {
        "architecture": architecture,
        "name": name or str(config.get("_name_or_path") or model_type),
        "num_layers": f.count("num_hidden_layers", high=_MAX_LAYERS),
        "hidden_size": f.count("hidden_size"),
        "vocab_size": f.count("vocab_size"),
        "num_heads": heads,
        "rms_eps": f.positive("rms_norm_eps"),
        "intermediate_size": f.count("intermediate_size", 0, low=0),
        "moe_intermediate_size": f.count("moe_intermediate_size"),
        "top_k": f.count("num_experts_per_tok", high=_MAX_EXPERTS),
        "tied_embeddings": f.flag("tie_word_embeddings", default=False),
    }
    build = _deepseek_from_hf if architecture == "deepseek2" else _qwen_from_hf
    rest = build(f, heads)
    rope: RopeSpec = rest["rope"]
    context = f.count("max_position_embeddings", high=1 << 30)
    if rope.scaling == "yarn":  # hand-edited configs keep the unscaled length there
        context = max(context, int(rope.original_context * rope.factor))
    return _checked(source, ModelSpec(**common, **rest, max_context=context))


def _qwen_from_hf(f: _Fields, heads: int) -> dict[str, Any]:
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
        "num_experts": f.count(experts, high=_MAX_EXPERTS),
        "num_shared_experts": int(qwen2),
        "shared_intermediate_size": f.count("shared_expert_intermediate_size") if qwen2 else 0,
        "num_dense_layers": len(dense),
        "qk_norm": not qwen2,
        "qkv_bias": f.flag("qkv_bias" if qwen2 else "attention_bias", default=qwen2),
        "norm_topk": f.flag("norm_topk_prob", default=False),
    }


def _deepseek_from_hf(f: _Fields, heads: int) -> dict[str, Any]:
    if f.count("moe_layer_freq", 1) != 1:
        raise f.error("moe_layer_freq", "is not 1, which is not supported")
    v3 = f.text("model_type") != "deepseek_v2"
    scoring = f.text("scoring_func", "sigmoid" if v3 else "softmax")
    if scoring not in ("softmax", "sigmoid"):
        raise f.error("scoring_func", f"is '{scoring}', supported are softmax, sigmoid")
    method = f.text("topk_method", "noaux_tc" if v3 else "greedy")
    nope, rope_dim = f.count("qk_nope_head_dim"), f.count("qk_rope_head_dim")
    shared = f.count("n_shared_experts", 0, low=0, high=_MAX_EXPERTS)
    grouped = method != "greedy"
    return {
        "num_kv_heads": heads,
        "head_dim": nope + rope_dim,
        "v_head_dim": f.count("v_head_dim"),
        "rope": _rope_from_hf(f, rope_dim, neox=False),
        "num_experts": f.count("n_routed_experts", high=_MAX_EXPERTS),
        "num_shared_experts": shared,
        "shared_intermediate_size": shared * f.count("moe_intermediate_size"),
        "num_dense_layers": f.count("first_k_dense_replace", 0, low=0, high=_MAX_LAYERS),
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


def _rope_from_hf(f: _Fields, dim: int, *, neox: bool) -> RopeSpec:
    """Read rope_theta with rope_scaling, or the newer rope_parameters that hold both."""
    values = {"rope_theta": f.values.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        part = f.values.get(key) or {}
        if not isinstance(part, Mapping):
            raise f.error(key, f"is {part}, expected an object")
        values |= part
    r = _Fields(f.source, values)
    theta = r.positive("rope_theta", 10000.0)
    scaling = r.text("rope_type", r.text("type", "default"))
    if scaling == "default":
        return RopeSpec(theta, dim, neox)
    if scaling not in ("linear", "yarn"):
        raise r.error("rope_type", f"is '{scaling}', supported are default, linear, yarn")
    factor = r.positive("factor")
    if scaling == "linear":
        return RopeSpec(theta, dim, neox, scaling, factor)
    context = f.count("max_position_embeddings", high=1 << 30)
    mscale, all_dim = r.number("mscale", 0.0), r.number("mscale_all_dim", 0.0)
    if mscale and all_dim:
        attn = _yarn_magnitude(factor, mscale) / _yarn_magnitude(factor, all_dim)
    else:
        attn = _yarn_magnitude(factor, 1.0)
    return RopeSpec(
        theta=theta,
        dim=dim,
        neox=neox,
        scaling=scaling,
        factor=factor,
        original_context=r.count("original_max_position_embeddings", context, high=1 << 30),
        attn_factor=r.positive("attention_factor", attn),
        beta_fast=r.positive("beta_fast", 32.0),
        beta_slow=r.positive("beta_slow", 1.0),
        yarn_log_multiplier=0.1 * all_dim,
    )


def _checked(source: str, spec: ModelSpec) -> ModelSpec:
    """Refuse values that contradict each other."""
    for wrong, sentence in (
        (spec.num_layers < 1, f"{spec.num_layers} layers"),
        (spec.num_heads % spec.num_kv_heads, f"{spec.num_heads} heads of {spec.num_kv_heads} kv"),
        (spec.top_k > spec.num_experts, f"{spec.top_k} of {spec.num_experts} experts per token"),
        (spec.rope.dim > spec.head_dim, f"rope over {spec.rope.dim} of {spec.head_dim} dims"),
        (spec.rope.dim % 2, f"rope over {spec.rope.dim} dimensions, an odd number"),
        (
            spec.expert_groups > 1 and spec.num_experts % spec.expert_groups,
            f"{spec.num_experts} experts in {spec.expert_groups} groups",
        ),
        (
            spec.expert_groups_used > spec.expert_groups,
            f"{spec.expert_groups_used} of {spec.expert_groups} expert groups",
        ),
        (
            spec.num_dense_layers > 0 and not spec.intermediate_size,
            f"{spec.num_dense_layers} dense layers without a width",
        ),
    ):
        if wrong:
            raise ConfigError(f"{source}: the model says {sentence}, which cannot be.")
    return spec
