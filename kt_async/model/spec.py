"""ModelSpec: everything the engine needs to know about a model, whatever file it came from.

Read from GGUF metadata here, from Hugging Face's config in `model.hf_config`; no other file knows
foreign key names. Which tensors follow from a spec is in `model.tensors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kt_async.errors import ConfigError
from kt_async.model.fields import MAX_CONTEXT, MAX_EXPERTS, MAX_LAYERS, Fields
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


_ARCHITECTURES = ("qwen3moe", "qwen2moe", "deepseek2")
SUPPORTED = "qwen3moe (Qwen3-MoE), qwen2moe (Qwen2-MoE), deepseek2 (DeepSeek V2, V3, R1)"


def spec_from_gguf(files: ModelFiles) -> ModelSpec:
    """Read the spec from GGUF metadata and, where files leave keys out, from tensor shapes.

    Raises ConfigError for an unsupported architecture and for missing or impossible values.
    """
    source = str(files.path)
    architecture = str(files.metadata.get("general.architecture", ""))
    if architecture not in _ARCHITECTURES:
        what = f"architecture '{architecture}' is" if architecture else "no architecture is"
        raise ConfigError(f"{source}: {what} not supported; supported are {SUPPORTED}.")
    embedding = files.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConfigError(f"{source}: tensor 'token_embd.weight' is missing or not a matrix.")
    f = Fields(source, files.metadata, f"{architecture}.")
    heads = f.count("attention.head_count")
    hidden = f.count("embedding_length")
    common: dict[str, Any] = {
        "architecture": architecture,
        "name": Fields(source, files.metadata).text("general.name") or files.path.stem,
        "num_layers": f.count("block_count", high=MAX_LAYERS)
        - f.count("nextn_predict_layers", 0, low=0, high=8),  # speculative heads come last
        "hidden_size": hidden,
        "vocab_size": embedding.shape[0],
        "max_context": f.count("context_length", high=MAX_CONTEXT),
        "num_heads": heads,
        "rms_eps": f.positive("attention.layer_norm_rms_epsilon"),
        "num_experts": f.count("expert_count", high=MAX_EXPERTS),
        "top_k": f.count("expert_used_count", high=MAX_EXPERTS),
        "tied_embeddings": "output.weight" not in files.tensors,
    }
    build = _deepseek_from_gguf if architecture == "deepseek2" else _qwen_from_gguf
    return check_spec(source, ModelSpec(**common, **build(f, files, heads, hidden)))


def _qwen_from_gguf(f: Fields, files: ModelFiles, heads: int, hidden: int) -> dict[str, Any]:
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


def _deepseek_from_gguf(f: Fields, files: ModelFiles, heads: int, _: int) -> dict[str, Any]:
    rope_dim = f.count("rope.dimension_count")
    # Files with absorbed projections (attn_k_b, attn_v_b) describe the compressed cache in
    # key_length and the real heads in key_length_mla; older files have only key_length.
    qk = f.count("attention.key_length_mla", f.count("attention.key_length"))
    v = f.count("attention.value_length_mla", f.count("attention.value_length"))
    width = f.count("expert_feed_forward_length")
    shared = f.count("expert_shared_count", 0, low=0, high=MAX_EXPERTS)
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
        "num_dense_layers": f.count("leading_dense_block_count", 0, low=0, high=MAX_LAYERS),
        "scoring": "sigmoid" if gating == 2 else "softmax",
        "norm_topk": f.flag("expert_weights_norm", default=False),
        "expert_scale": f.number("expert_weights_scale", 1.0) or 1.0,
        "expert_groups": f.count("expert_group_count", 0, low=0, high=MAX_EXPERTS),
        "expert_groups_used": f.count("expert_group_used_count", 0, low=0, high=MAX_EXPERTS),
        "q_lora_rank": 0 if direct else f.count("attention.q_lora_rank"),
        "kv_lora_rank": f.count("attention.kv_lora_rank"),
        "nope_head_dim": qk - rope_dim,
        "rope_head_dim": rope_dim,
        "extra": {
            "router_bias": bias,
            "absorbed": "blk.0.attn_k_b.weight" in files.tensors,
        },
    }


def _rope_from_gguf(f: Fields, dim: int, *, neox: bool) -> RopeSpec:
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
    attn = 1.0 if log_multiplier else yarn_magnitude(factor, 1.0)
    return RopeSpec(
        theta=theta,
        dim=dim,
        neox=neox,
        scaling=scaling,
        factor=factor,
        original_context=f.count("rope.scaling.original_context_length", high=MAX_CONTEXT),
        attn_factor=attn * f.positive("rope.scaling.attn_factor", 1.0),
        beta_fast=f.positive("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=f.positive("rope.scaling.yarn_beta_slow", 1.0),
        yarn_log_multiplier=log_multiplier,
    )


def yarn_magnitude(factor: float, mscale: float) -> float:
    """YaRN's attention temperature (section 3.4 of the paper), as every checkpoint uses it."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def check_spec(source: str, spec: ModelSpec) -> ModelSpec:
    """Return the spec, or raise ConfigError when its values contradict each other."""
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
