"""ModelSpec: everything the engine needs to know about a model, whatever file it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    extra: Mapping[str, Any] = field(default_factory=dict)
