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
from transformers import AutoModelForCausalLM

from kt_async.demo import DEMO_SPEC
from kt_async.model.spec import ModelSpec, RopeSpec, spec_from_gguf
from kt_async.model.synthetic import fitting_type, metadata_from_spec
from kt_async.model.tensors import check_tensors, expected_tensors
from kt_async.text.pretokenize import BYTES
from kt_async.weights.source import TYPE_IDS, open_model
from kt_async.weights.writer import TensorData, write_gguf
from tests.reference.hf_names import Weights, hf_config, to_hf
from tests.reference.quantize import dequantize, quantize

# Two threads wait for each other far longer than models of this size compute, above all on a busy
# machine: 700 tokens took 11.5 s with two, 0.35 s with one.
torch.set_num_threads(1)

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
# DeepSeek V2-Lite's kind: direct queries, softmax over all experts, one joined attn_kv_b.
DEEPSEEK2 = ModelSpec(
    architecture="deepseek2",
    name="deepseek2-test",
    num_layers=3,
    hidden_size=256,
    vocab_size=512,
    max_context=2048,
    num_heads=4,
    num_kv_heads=4,
    head_dim=96,
    v_head_dim=128,
    rms_eps=1e-6,
    rope=RopeSpec(
        theta=10000.0,
        dim=32,
        neox=False,
        scaling="yarn",
        factor=8.0,
        original_context=256,
        yarn_log_multiplier=0.1 * 0.707,
    ),
    intermediate_size=512,
    num_experts=16,
    top_k=4,
    moe_intermediate_size=256,
    num_shared_experts=2,
    shared_intermediate_size=512,
    num_dense_layers=1,
    norm_topk=False,
    kv_lora_rank=256,
    nope_head_dim=64,
    rope_head_dim=32,
    extra={"router_bias": False, "absorbed": False},
)
# DeepSeek V3's: compressed queries, sigmoid scores with a selection bias, groups, absorbed file.
DEEPSEEK3 = replace(
    DEEPSEEK2,
    name="deepseek3-test",
    q_lora_rank=256,
    scoring="sigmoid",
    norm_topk=True,
    expert_scale=2.5,
    expert_groups=4,
    expert_groups_used=2,
    num_shared_experts=1,
    shared_intermediate_size=256,
    extra={"router_bias": True, "absorbed": True},
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
        kind = fitting_type(kind, values.shape[-1])
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
        hf_config(spec), dtype=torch.float32, attn_implementation="eager"
    )
    state = {name: torch.tensor(values) for name, values in to_hf(spec, weights).items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


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
