"""Which tensors a model of a given spec consists of, and whether a file holds them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from kt_async.errors import ConfigError
from kt_async.model.spec import ModelSpec
from kt_async.weights.source import ModelFiles

_log = logging.getLogger(__name__)
Shape = tuple[int, ...]


def expected_tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Return GGUF name -> row-major shape of every tensor the model needs."""
    h = spec.hidden_size
    result: dict[str, Shape] = {"token_embd.weight": (spec.vocab_size, h)}
    attention = _mla if spec.kv_lora_rank else _gqa
    for layer in range(spec.num_layers):
        parts = dict(attention(spec))
        parts |= {"attn_norm.weight": (h,), "ffn_norm.weight": (h,)}
        parts |= dict(_dense(spec) if layer < spec.num_dense_layers else _experts(spec))
        result |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    result["output_norm.weight"] = (h,)
    if not spec.tied_embeddings:
        result["output.weight"] = (spec.vocab_size, h)
    return result


def check_tensors(spec: ModelSpec, files: ModelFiles) -> None:
    """Raise ConfigError for the first tensor that is missing or has another shape.

    A vector may be stored as a matrix of one row. Tensors nobody needs are logged.
    """
    expected = expected_tensors(spec)
    for name, shape in expected.items():
        info = files.tensors.get(name)
        if info is None:
            raise ConfigError(f"{files.path}: tensor '{name}' is missing.")
        if _stripped(info.shape) != _stripped(shape):
            raise ConfigError(
                f"{info.file}: tensor '{name}' has shape {_text(info.shape)}, "
                f"but the model's settings need {_text(shape)}."
            )
    unused = [name for name in files.tensors if name not in expected]
    if unused:
        _log.warning(
            "%s: %d tensors are not part of this architecture and stay unused (%s ...)",
            files.path,
            len(unused),
            ", ".join(unused[:3]),
        )


def _stripped(shape: Shape) -> Shape:
    """Drop leading dimensions of 1, which some writers keep and some do not."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _text(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def _gqa(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    h, d, v = spec.hidden_size, spec.head_dim, spec.v_head_dim or spec.head_dim
    rows = {"q": spec.num_heads * d, "k": spec.num_kv_heads * d, "v": spec.num_kv_heads * v}
    for part, size in rows.items():
        yield f"attn_{part}.weight", (size, h)
        if spec.qkv_bias:
            yield f"attn_{part}.bias", (size,)
    if spec.qk_norm:
        yield "attn_q_norm.weight", (d,)
        yield "attn_k_norm.weight", (d,)
    yield "attn_output.weight", (h, spec.num_heads * v)


def _mla(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    h, heads, rank = spec.hidden_size, spec.num_heads, spec.kv_lora_rank
    nope, v, query = spec.nope_head_dim, spec.v_head_dim, spec.q_lora_rank
    if query:
        yield "attn_q_a.weight", (query, h)
        yield "attn_q_a_norm.weight", (query,)
        yield "attn_q_b.weight", (heads * spec.head_dim, query)
    else:
        yield "attn_q.weight", (heads * spec.head_dim, h)
    yield "attn_kv_a_mqa.weight", (rank + spec.rope_head_dim, h)
    yield "attn_kv_a_norm.weight", (rank,)
    if spec.extra.get("absorbed"):
        yield "attn_k_b.weight", (heads, rank, nope)
        yield "attn_v_b.weight", (heads, v, rank)
    else:
        yield "attn_kv_b.weight", (heads * (nope + v), rank)
    yield "attn_output.weight", (h, heads * v)


def _dense(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    yield from _mlp("", spec.hidden_size, spec.intermediate_size)


def _experts(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    h, width, count = spec.hidden_size, spec.moe_intermediate_size, spec.num_experts
    yield "ffn_gate_inp.weight", (count, h)
    if spec.extra.get("router_bias"):
        yield "exp_probs_b.bias", (count,)
    for name, shape in _mlp("_exps", h, width):
        yield name, (count, *shape)
    if spec.shared_intermediate_size:
        yield from _mlp("_shexp", h, spec.shared_intermediate_size)
        if spec.architecture == "qwen2moe":
            yield "ffn_gate_inp_shexp.weight", (h,)


def _mlp(suffix: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"ffn_gate{suffix}.weight", (width, hidden)
    yield f"ffn_up{suffix}.weight", (width, hidden)
    yield f"ffn_down{suffix}.weight", (hidden, width)
