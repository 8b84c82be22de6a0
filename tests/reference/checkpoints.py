"""Small random models as Hugging Face sees them and as GGUF files of any type.

`make_checkpoint` writes a GGUF; `exact_model` turns any such file back into the Hugging Face model
in float32 with exactly the dequantised weights, which is the right answer for that file.
Torch and transformers only; nothing of the engine is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen3MoeConfig

from kt_async.demo import DEMO_SPEC
from kt_async.model.spec import ModelSpec, spec_from_gguf
from kt_async.model.synthetic import metadata_from_spec
from kt_async.model.tensors import check_tensors, expected_tensors
from kt_async.text.pretokenize import BYTES
from kt_async.weights.source import TYPE_IDS, open_model
from kt_async.weights.writer import TensorData, write_gguf
from tests.reference.quantize import dequantize, quantize

# Two threads wait for each other far longer than models of this size compute, above all on a busy
# machine: 700 tokens took 11.5 s with two, 0.35 s with one.
torch.set_num_threads(1)

Weights = dict[str, npt.NDArray[np.float32]]

# Hidden sizes are multiples of 256, so that k-quants apply to every matrix. Even widths differ
# from each other where they can, so that a swapped dimension shows.
QWEN3 = replace(
    DEMO_SPEC,
    name="qwen3moe-test",
    num_layers=3,
    vocab_size=512,
    max_context=2048,
    intermediate_size=512,
)
QWEN2 = replace(
    QWEN3,
    architecture="qwen2moe",
    name="qwen2moe-test",
    qk_norm=False,
    qkv_bias=True,
    norm_topk=False,
    num_shared_experts=1,
    shared_intermediate_size=512,
)


def random_weights(spec: ModelSpec, seed: int = 0) -> Weights:
    """Draw float32 weights: activations stay near 1, logits spread by about 2, norms vary."""
    rng = np.random.default_rng(seed)
    weights: Weights = {}
    for name, shape in expected_tensors(spec).items():
        values = rng.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif name.endswith(".bias"):
            values *= 0.2
        elif name != "token_embd.weight":
            gain = 2.0 if name == "output.weight" or "ffn_gate_inp" in name else 1.0
            values *= gain * shape[-1] ** -0.5
        weights[name] = values.astype(np.float32)
    return weights


def make_checkpoint(
    path: Path,
    type_name: str | Callable[[str], str] = "F32",
    spec: ModelSpec = QWEN3,
    seed: int = 0,
) -> Path:
    """Write a random model whose matrices have one type (or the type that a function of the name
    returns); vectors and routers stay F32, as converters keep them. Returns `path`."""
    write_checkpoint(path, spec, random_weights(spec, seed), type_name)
    return path


def write_checkpoint(
    path: Path, spec: ModelSpec, weights: Weights, type_name: str | Callable[[str], str] = "F32"
) -> None:
    """Write given weights as GGUF with a byte-level vocabulary of the model's size."""
    tensors = []
    for name, values in weights.items():
        kind = type_name if isinstance(type_name, str) else type_name(name)
        if values.ndim == 1 or "ffn_gate_inp" in name:
            kind = "F32"
        raw = np.ascontiguousarray(quantize(values, kind))
        tensors.append(TensorData(name, TYPE_IDS[kind], values.shape, [raw.data]))
    write_gguf(path, metadata_from_spec(spec) | _vocabulary(spec.vocab_size), tensors)


def _vocabulary(size: int) -> dict[str, Any]:
    """One token per byte, two chat markers, padding up to the embedding's rows."""
    tokens = [*BYTES, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    types = [1] * 256 + [3] * 3 + [5] * (size - 259)
    tokens += [f"[PAD{index}]" for index in range(259, size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.ggml.bos_token_id": 256,
    }


def read_weights(path: Path) -> tuple[ModelSpec, Weights]:
    """Return a file's spec and its weights, exactly dequantised by the gguf package."""
    files = open_model(path)
    spec = spec_from_gguf(files)
    check_tensors(spec, files)
    weights = {
        name: dequantize(files.data(name), info.type_name, info.shape)
        for name, info in files.tensors.items()
    }
    return spec, weights


def exact_model(path: Path) -> Any:
    """Return the Hugging Face model in float32 that a GGUF file describes exactly."""
    return hf_model(*read_weights(path))


def hf_model(spec: ModelSpec, weights: Mapping[str, npt.NDArray[np.float32]]) -> Any:
    """Build the Hugging Face model (eval, eager attention) with the given GGUF-named weights."""
    model = AutoModelForCausalLM.from_config(
        _config(spec), dtype=torch.float32, attn_implementation="eager"
    )
    state = {name: torch.tensor(values) for name, values in to_hf(spec, weights).items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def _config(spec: ModelSpec) -> Any:
    common: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_context,
        "rms_norm_eps": spec.rms_eps,
        "tie_word_embeddings": spec.tied_embeddings,
        "rope_parameters": _rope(spec),
        "moe_intermediate_size": spec.moe_intermediate_size,
        "num_experts": spec.num_experts,
        "num_experts_per_tok": spec.top_k,
        "norm_topk_prob": spec.norm_topk,
        "experts_implementation": "eager",
    }
    if spec.architecture == "qwen3moe":
        return Qwen3MoeConfig(**common)
    if spec.architecture == "qwen2moe":
        shared = spec.shared_intermediate_size
        return Qwen2MoeConfig(**common, shared_expert_intermediate_size=shared)
    raise ValueError(f"no reference for {spec.architecture}")


def _rope(spec: ModelSpec) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": spec.rope.theta, "rope_type": "default"}
    if spec.rope.scaling != "none":
        rope |= {"rope_type": spec.rope.scaling, "factor": spec.rope.factor}
    if spec.rope.scaling == "yarn":
        rope["original_max_position_embeddings"] = spec.rope.original_context
    return rope


# GGUF name inside a layer -> Hugging Face name; expert gate and up are joined by to_hf.
_LAYER = {
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
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
    "ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
}
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def to_hf(spec: ModelSpec, weights: Mapping[str, npt.NDArray[np.float32]]) -> Weights:
    """Rename GGUF weights to the transformers package's state dict. No weight is permuted: these
    families rotate half-split pairs in both worlds."""
    result: Weights = {}
    for name, values in weights.items():
        if name in _OUTER:
            result[_OUTER[name]] = values
            continue
        _, layer, part = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        if part == "ffn_gate_exps.weight":
            up = weights[f"blk.{layer}.ffn_up_exps.weight"]
            result[f"{prefix}mlp.experts.gate_up_proj"] = np.concatenate([values, up], 1)
        elif part == "ffn_gate_inp_shexp.weight":
            result[prefix + _LAYER[part]] = values.reshape(1, -1)
        elif part != "ffn_up_exps.weight":
            result[prefix + _LAYER[part]] = values
    if spec.tied_embeddings:
        result["lm_head.weight"] = weights["token_embd.weight"]
    return result


def hf_logprobs(model: Any, ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return log-probabilities [T, V]: row t is the distribution after ids[: t + 1]."""
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)])).logits[0]
        return np.asarray(torch.log_softmax(logits.double(), -1).numpy())


def hf_greedy(model: Any, ids: Sequence[int], count: int) -> list[int]:
    """Return `count` greedy tokens after `ids`, recomputing everything each time."""
    tokens = list(ids)
    for _ in range(count):
        tokens.append(int(hf_logprobs(model, tokens)[-1].argmax()))
    return tokens[len(ids) :]


def random_ids(count: int, seed: int = 0, vocab_size: int = 512) -> list[int]:
    """Return a random prompt."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab_size, count)]


def mean_kl(exact: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Return the mean over positions of KL(exact || other), in nats, from log-probabilities."""
    return float((np.exp(exact) * (exact - other)).sum(-1).mean())
