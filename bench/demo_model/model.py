"""The demo model in torch: Qwen3MoE, written for training speed at a tiny size.

Every expert is computed for every token and the unused ones are masked out. With 16 experts of
256 neurons that is one dense MLP of width 4,096, which a GPU runs faster than any gather or
scatter, and the result and the gradients are those of the sparse model. Serving code never
imports this file; `evaluate.py` checks it against transformers' Qwen3MoeForCausalLM.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """Shape of the demo model; `as_hf` gives the same under transformers' names."""

    vocab_size: int = 4096
    num_layers: int = 6
    hidden_size: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    num_experts: int = 16
    top_k: int = 4
    moe_intermediate_size: int = 256
    rope_theta: float = 10_000.0
    rms_eps: float = 1e-6
    max_context: int = 8192

    def as_hf(self) -> dict[str, Any]:
        """Keyword arguments of transformers' Qwen3MoeConfig for this shape."""
        return {
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": 4 * self.hidden_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.moe_intermediate_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_eps,
            "max_position_embeddings": self.max_context,
            "tie_word_embeddings": False,
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        f = x.float()
        f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + self.eps)
        return (f * self.weight).to(x.dtype)


def rope_tables(length: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, dim] of the half-split (NeoX) rotary embedding, float32."""
    freq = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), freq)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to x [B, heads, L, dim]."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with a norm on each query and key head, as Qwen3 has it."""

    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, L, H]; mask bool [B, 1, L, L] (True = may look), None = plain causal."""
        b, n, _ = x.shape
        c = self.c
        q = self.q_norm(self.q_proj(x).view(b, n, c.num_heads, c.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(b, n, c.num_kv_heads, c.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(b, n, c.num_kv_heads, c.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = c.num_heads // c.num_kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(out.transpose(1, 2).reshape(b, n, -1))


class Experts(nn.Module):
    """Router and experts. gate_up [E * 2I, H] holds all gate rows, then all up rows."""

    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.c = c
        width = c.num_experts * c.moe_intermediate_size
        self.router = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        self.gate_up = nn.Linear(c.hidden_size, 2 * width, bias=False)
        self.down = nn.Linear(width, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, H] -> (output [B, L, H], router probabilities, chosen mask), both [B, L, E]."""
        c = self.c
        probs = F.linear(x.float(), self.router.weight.float()).softmax(-1)
        top, index = probs.topk(c.top_k, dim=-1)
        chosen = torch.zeros_like(probs).scatter(-1, index, 1.0)
        weight = probs * chosen / top.sum(-1, keepdim=True)
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        hidden = (F.silu(gate) * up).unflatten(-1, (c.num_experts, c.moe_intermediate_size))
        hidden = hidden * weight.to(hidden.dtype).unsqueeze(-1)
        return self.down(hidden.flatten(-2)), probs, chosen


class Layer(nn.Module):
    """Pre-norm attention and experts with residuals."""

    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.input_norm = RMSNorm(c.hidden_size, c.rms_eps)
        self.attention = Attention(c)
        self.post_norm = RMSNorm(c.hidden_size, c.rms_eps)
        self.experts = Experts(c)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.attention(self.input_norm(x), cos, sin, mask)
        out, probs, chosen = self.experts(self.post_norm(x))
        return x + out, probs, chosen


class DemoModel(nn.Module):
    """ids [B, L] -> logits [B, L, V], with the router's choices when asked for."""

    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_eps)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self._init()

    def _init(self) -> None:
        residual = 0.02 / math.sqrt(2 * self.c.num_layers)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                is_residual = name.endswith(("o_proj.weight", "down.weight"))
                nn.init.normal_(weight, std=residual if is_residual else 0.02)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits in float32, the load-balance loss, and chosen experts [layers, B, L, E]."""
        c = self.c
        cos, sin = rope_tables(ids.shape[1], c.head_dim, c.rope_theta, ids.device)
        x = self.embed(ids)
        balance = x.new_zeros((), dtype=torch.float32)
        routes = []
        for layer in self.layers:
            x, probs, chosen = layer(x, cos, sin, mask)
            # Switch-style loss: 1.0 when both shares are uniform (Fedus et al. 2021, eq. 4).
            share = chosen.mean((0, 1)) / c.top_k
            balance = balance + c.num_experts * (share * probs.mean((0, 1))).sum()
            routes.append(chosen)
        logits = self.head(self.norm(x)).float()
        return logits, balance / c.num_layers, torch.stack(routes)


def to_hf_names(model: DemoModel) -> dict[str, Tensor]:
    """The weights under the names and shapes of a Hugging Face Qwen3MoE checkpoint."""
    c = model.c
    i = c.moe_intermediate_size
    out = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for n, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        p = f"model.layers.{n}."
        out[p + "input_layernorm.weight"] = layer.input_norm.weight
        out[p + "post_attention_layernorm.weight"] = layer.post_norm.weight
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            out[f"{p}self_attn.{part}.weight"] = getattr(layer.attention, part).weight
        out[p + "mlp.gate.weight"] = layer.experts.router.weight
        gate, up = layer.experts.gate_up.weight.chunk(2)
        for e in range(c.num_experts):
            rows = slice(e * i, (e + 1) * i)
            out[f"{p}mlp.experts.{e}.gate_proj.weight"] = gate[rows]
            out[f"{p}mlp.experts.{e}.up_proj.weight"] = up[rows]
            out[f"{p}mlp.experts.{e}.down_proj.weight"] = layer.experts.down.weight[:, rows]
    return {name: value.detach().float().contiguous() for name, value in out.items()}
