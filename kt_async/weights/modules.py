"""The modules of a model under the names its Hugging Face implementation gives them.

Rule files address modules by these dotted names; each module knows the GGUF tensors it consists
of. Pure: built from the ModelSpec alone. Used by `placement` and `plan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kt_async.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Module:
    """One node of the module tree.

    kind: model, container, embedding, layer, attention, rope, linear, gate, moe, mlp, experts or
    rms_norm. tensors: GGUF names; a model file may hold only some of them (biases, tied output).
    """

    name: str
    kind: str
    tensors: tuple[str, ...] = ()


def list_modules(spec: ModelSpec) -> list[Module]:
    """All modules, each parent before its children."""
    found = [
        Module("model", "model"),
        Module("model.embed_tokens", "embedding", ("token_embd.weight",)),
        Module("model.rotary_emb", "rope"),
        Module("model.layers", "container"),
    ]
    for layer in range(spec.num_layers):
        found += _layer(spec, layer)
    found.append(Module("model.norm", "rms_norm", ("output_norm.weight",)))
    found.append(Module("lm_head", "linear", ("output.weight",)))
    return found


def _layer(spec: ModelSpec, layer: int) -> list[Module]:
    name, tensor = f"model.layers.{layer}", f"blk.{layer}"
    found = [
        Module(name, "layer"),
        _weight(f"{name}.input_layernorm", "rms_norm", f"{tensor}.attn_norm"),
        Module(f"{name}.self_attn", "attention"),
        Module(f"{name}.self_attn.rotary_emb", "rope"),
    ]
    attention = _latent_attention if spec.kv_lora_rank else _grouped_attention
    found += attention(spec, f"{name}.self_attn", tensor)
    found.append(_weight(f"{name}.post_attention_layernorm", "rms_norm", f"{tensor}.ffn_norm"))
    mlp = f"{name}.mlp"
    if layer < spec.num_dense_layers or not spec.num_experts:
        return [*found, Module(mlp, "mlp"), *_projections(mlp, tensor, "")]
    latent = spec.architecture == "deepseek2"
    found += [
        Module(mlp, "moe"),
        Module(
            f"{mlp}.gate",
            "gate" if latent else "linear",
            (f"{tensor}.ffn_gate_inp.weight", f"{tensor}.exp_probs_b.bias"),
        ),
        Module(
            f"{mlp}.experts",
            "experts",
            tuple(f"{tensor}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")),
        ),
    ]
    if spec.num_shared_experts or spec.shared_intermediate_size:
        shared = f"{mlp}.shared_experts" if latent else f"{mlp}.shared_expert"
        found += [Module(shared, "mlp"), *_projections(shared, tensor, "_shexp")]
        if not latent:
            gate = f"{tensor}.ffn_gate_inp_shexp"
            found.append(_weight(f"{mlp}.shared_expert_gate", "linear", gate))
    return found


def _grouped_attention(spec: ModelSpec, name: str, tensor: str) -> list[Module]:
    found = [
        Module(
            f"{name}.{part}_proj",
            "linear",
            (f"{tensor}.attn_{part}.weight", f"{tensor}.attn_{part}.bias"),
        )
        for part in ("q", "k", "v")
    ]
    if spec.qk_norm:
        found += [
            _weight(f"{name}.{part}_norm", "rms_norm", f"{tensor}.attn_{part}_norm")
            for part in ("q", "k")
        ]
    return [*found, _weight(f"{name}.o_proj", "linear", f"{tensor}.attn_output")]


def _latent_attention(spec: ModelSpec, name: str, tensor: str) -> list[Module]:
    if spec.q_lora_rank:
        found = [
            _weight(f"{name}.q_a_proj", "linear", f"{tensor}.attn_q_a"),
            _weight(f"{name}.q_a_layernorm", "rms_norm", f"{tensor}.attn_q_a_norm"),
            _weight(f"{name}.q_b_proj", "linear", f"{tensor}.attn_q_b"),
        ]
    else:
        found = [_weight(f"{name}.q_proj", "linear", f"{tensor}.attn_q")]
    split = tuple(f"{tensor}.attn_{part}_b.weight" for part in ("kv", "k", "v"))
    return [
        *found,
        _weight(f"{name}.kv_a_proj_with_mqa", "linear", f"{tensor}.attn_kv_a_mqa"),
        _weight(f"{name}.kv_a_layernorm", "rms_norm", f"{tensor}.attn_kv_a_norm"),
        Module(f"{name}.kv_b_proj", "linear", split),
        _weight(f"{name}.o_proj", "linear", f"{tensor}.attn_output"),
    ]


def _projections(name: str, tensor: str, suffix: str) -> list[Module]:
    return [
        _weight(f"{name}.{part}_proj", "linear", f"{tensor}.ffn_{part}{suffix}")
        for part in ("gate", "up", "down")
    ]


def _weight(name: str, kind: str, tensor: str) -> Module:
    return Module(name, kind, (f"{tensor}.weight",))
