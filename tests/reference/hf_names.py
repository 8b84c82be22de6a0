"""GGUF weights and specs in the transformers package's words: configs and state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import DeepseekV2Config, DeepseekV3Config, Qwen2MoeConfig, Qwen3MoeConfig

from kt_async.model.spec import ModelSpec

Weights = dict[str, npt.NDArray[np.float32]]


def hf_config(spec: ModelSpec) -> Any:
    """Return the configuration object of a spec's family."""
    common: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "max_position_embeddings": spec.max_context,
        "rms_norm_eps": spec.rms_eps,
        "tie_word_embeddings": spec.tied_embeddings,
        "rope_parameters": _rope(spec),
        "moe_intermediate_size": spec.moe_intermediate_size,
        "num_experts_per_tok": spec.top_k,
        "norm_topk_prob": spec.norm_topk,
        "experts_implementation": "eager",
    }
    if spec.architecture == "deepseek2":
        return _deepseek_config(spec, common)
    common |= {"num_experts": spec.num_experts, "head_dim": spec.head_dim}
    if spec.architecture == "qwen3moe":
        return Qwen3MoeConfig(**common)
    shared = spec.shared_intermediate_size
    return Qwen2MoeConfig(**common, shared_expert_intermediate_size=shared)


def _deepseek_config(spec: ModelSpec, common: dict[str, Any]) -> Any:
    common |= {
        "n_routed_experts": spec.num_experts,
        "n_shared_experts": spec.num_shared_experts,
        "first_k_dense_replace": spec.num_dense_layers,
        "routed_scaling_factor": spec.expert_scale,
        "n_group": spec.expert_groups or None,
        "topk_group": spec.expert_groups_used or None,
        "q_lora_rank": spec.q_lora_rank or None,
        "kv_lora_rank": spec.kv_lora_rank,
        "qk_nope_head_dim": spec.nope_head_dim,
        "qk_rope_head_dim": spec.rope_head_dim,
        "v_head_dim": spec.v_head_dim,
    }
    if spec.scoring == "sigmoid":
        return DeepseekV3Config(**common)
    return DeepseekV2Config(**common, topk_method="greedy")


def _rope(spec: ModelSpec) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": spec.rope.theta, "rope_type": "default"}
    if spec.rope.scaling != "none":
        rope |= {"rope_type": spec.rope.scaling, "factor": spec.rope.factor}
    if spec.rope.scaling == "yarn":
        rope["original_max_position_embeddings"] = spec.rope.original_context
    if spec.rope.yarn_log_multiplier:
        mscale = spec.rope.yarn_log_multiplier / 0.1
        rope |= {"mscale": mscale, "mscale_all_dim": mscale}
    return rope


# GGUF name inside a layer -> Hugging Face name. Joined tensors are made by _joined.
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_kv_b.weight": "self_attn.kv_b_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
    "ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
}
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def to_hf(spec: ModelSpec, weights: Mapping[str, npt.NDArray[np.float32]]) -> Weights:
    """Rename GGUF weights to the transformers package's state dict.

    No weight is permuted: Qwen rotates half-split pairs and DeepSeek interleaved ones in both
    worlds.
    """
    result: Weights = {}
    for name, values in weights.items():
        if name in OUTER:
            result[OUTER[name]] = values
            continue
        _, layer, part = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        if part in LAYER:
            result[prefix + layer_name(spec, part)] = values
        if part == "ffn_gate_inp_shexp.weight":
            result[prefix + LAYER[part]] = values.reshape(1, -1)
        if part == "ffn_gate_exps.weight":
            up = weights[f"blk.{layer}.ffn_up_exps.weight"]
            result[f"{prefix}mlp.experts.gate_up_proj"] = np.concatenate([values, up], 1)
        if part == "attn_k_b.weight":
            joined = _joined_kv_b(values, weights[f"blk.{layer}.attn_v_b.weight"])
            result[f"{prefix}self_attn.kv_b_proj.weight"] = joined
    if spec.tied_embeddings:
        result["lm_head.weight"] = weights["token_embd.weight"]
    return result


def layer_name(spec: ModelSpec, part: str) -> str:
    """Return the Hugging Face name of a tensor inside a layer."""
    name = LAYER[part]
    # DeepSeek has several shared experts, in one matrix.
    several = spec.architecture == "deepseek2"
    return name.replace("shared_expert.", "shared_experts.") if several else name


def _joined_kv_b(
    k_b: npt.NDArray[np.float32], v_b: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Join the absorbed halves: k_b [heads, rank, nope] and v_b [heads, v, rank] give
    [heads * (nope + v), rank]."""
    both = np.concatenate([k_b.transpose(0, 2, 1), v_b], 1)
    return both.reshape(-1, both.shape[-1])
