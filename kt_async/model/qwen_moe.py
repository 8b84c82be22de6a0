"""Qwen3MoE and Qwen2MoE: pre-norm decoder with grouped-query attention and routed experts.

Qwen3MoE norms q and k per head and has no biases; Qwen2MoE has biases on q, k and v and a shared
expert behind a sigmoid gate. Source: the models' Hugging Face reference implementations.
"""

from __future__ import annotations

from collections.abc import Generator

from kt_async.model.ops import AttentionShape, Ops, Routing, Value
from kt_async.model.spec import ModelSpec


def forward(ops: Ops[Value], spec: ModelSpec) -> Generator[None, None, Value]:
    """Logits [S, V] of the step's logit rows; yields after every layer."""
    x = ops.embed("token_embd.weight")
    for layer in range(spec.num_layers):
        x = _attention(ops, spec, layer, x)
        x = _mlp(ops, spec, layer, x)
        yield
    x = ops.last_rows(x)
    x = ops.rms_norm(x, "output_norm.weight", spec.rms_eps)
    head = "output.weight" if ops.has("output.weight") else "token_embd.weight"
    return ops.linear(x, head)


def _attention(ops: Ops[Value], spec: ModelSpec, layer: int, x: Value) -> Value:
    name = f"blk.{layer}."
    h = ops.rms_norm(x, f"{name}attn_norm.weight", spec.rms_eps)
    parts = [f"{name}attn_{part}" for part in ("q", "k", "v")]
    biases = [f"{part}.bias" for part in parts] if spec.qkv_bias else None
    q, k, v = ops.linears(h, [f"{part}.weight" for part in parts], biases)
    shape = AttentionShape(
        layer=layer,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        eps=spec.rms_eps,
        scale=spec.head_dim**-0.5,
        rope=spec.rope,
    )
    out = ops.attention(
        q,
        k,
        v,
        shape,
        q_norm=f"{name}attn_q_norm.weight" if spec.qk_norm else None,
        k_norm=f"{name}attn_k_norm.weight" if spec.qk_norm else None,
    )
    return ops.linear(out, f"{name}attn_output.weight", residual=x)


def _mlp(ops: Ops[Value], spec: ModelSpec, layer: int, x: Value) -> Value:
    name = f"blk.{layer}."
    h = ops.rms_norm(x, f"{name}ffn_norm.weight", spec.rms_eps)
    if layer < spec.num_dense_layers:
        gated = ops.silu_mul(
            ops.linear(h, f"{name}ffn_gate.weight"), ops.linear(h, f"{name}ffn_up.weight")
        )
        return ops.linear(gated, f"{name}ffn_down.weight", residual=x)
    routing = Routing(spec.top_k, spec.scoring, spec.norm_topk, spec.expert_scale)

    def add_shared(x: Value) -> Value:
        shared = ops.silu_mul(
            ops.linear(h, f"{name}ffn_gate_shexp.weight"),
            ops.linear(h, f"{name}ffn_up_shexp.weight"),
        )
        shared = ops.linear(shared, f"{name}ffn_down_shexp.weight")
        return ops.gate_add(x, ops.linear(h, f"{name}ffn_gate_inp_shexp.weight"), shared)

    return ops.experts(
        h,
        x,
        routing,
        router=f"{name}ffn_gate_inp.weight",
        gate=f"{name}ffn_gate_exps.weight",
        up=f"{name}ffn_up_exps.weight",
        down=f"{name}ffn_down_exps.weight",
        beside=add_shared if spec.shared_intermediate_size else None,
    )
