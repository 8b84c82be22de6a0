"""Write the trained weights as the GGUF that kt_async ships.

    python -m bench.demo_model.write_gguf --run DIR --out kt_async/data/demo.gguf

DIR is the --out folder of train.py. Types follow a Q4_K_M file: experts Q4_K, those of the first
and last layer and the output Q6_K, embedding and attention Q8_0, router and norms F32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers import Tokenizer

from bench.demo_model.quantize import quantize
from bench.demo_model.train_tokenizer import (
    CHAT_TEMPLATE,
    CONTROL,
    END_OF_TEXT,
    IM_END,
    USER_DEFINED,
)

Floats = npt.NDArray[np.float32]

NORMAL, CONTROL_TYPE, USER_TYPE = 1, 3, 4  # GGUF token types
FILE_TYPE_Q4_K_M = 15
QUANT_VERSION = 2


def load_weights(run: Path) -> dict[str, Floats]:
    """All weights of a run under Hugging Face names, float32."""
    out: dict[str, Floats] = {}
    for piece in sorted(run.glob("weights-*.npz")):
        with np.load(piece) as data:
            out |= {name: data[name].astype(np.float32) for name in data.files}
    if not out:
        raise SystemExit(f"{run}: no weights-*.npz there; run train.py first.")
    return out


def gguf_tensors(weights: dict[str, Floats], config: dict[str, Any]) -> dict[str, Floats]:
    """The same weights under GGUF names, experts stacked [E, out, in]."""
    out = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for n in range(config["num_layers"]):
        hf, blk = f"model.layers.{n}.", f"blk.{n}."
        out[blk + "attn_norm.weight"] = weights[hf + "input_layernorm.weight"]
        for ours, theirs in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj"),
                             ("attn_output", "o_proj"), ("attn_q_norm", "q_norm"),
                             ("attn_k_norm", "k_norm")):  # fmt: skip
            out[f"{blk}{ours}.weight"] = weights[f"{hf}self_attn.{theirs}.weight"]
        out[blk + "ffn_norm.weight"] = weights[hf + "post_attention_layernorm.weight"]
        out[blk + "ffn_gate_inp.weight"] = weights[hf + "mlp.gate.weight"]
        for part in ("gate", "up", "down"):
            out[f"{blk}ffn_{part}_exps.weight"] = np.stack([
                weights[f"{hf}mlp.experts.{e}.{part}_proj.weight"]
                for e in range(config["num_experts"])
            ])  # fmt: skip
    return out


def type_of(name: str, num_layers: int) -> str:
    """The type a tensor is written in."""
    if "norm" in name or "ffn_gate_inp" in name:
        return "F32"
    if "_exps" in name:
        layer = int(name.split(".")[1])
        return "Q6_K" if layer in (0, num_layers - 1) else "Q4_K"
    return "Q6_K" if name == "output.weight" else "Q8_0"


def add_metadata(writer: GGUFWriter, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Model, tokenizer and chat template as GGUF keys."""
    writer.add_name("kt-async-demo")
    writer.add_description("The built-in help desk of kt_async: a tiny model trained on own text")
    writer.add_license("apache-2.0")
    writer.add_size_label("16x1.5M")
    writer.add_file_type(FILE_TYPE_Q4_K_M)
    writer.add_quantization_version(QUANT_VERSION)
    writer.add_block_count(config["num_layers"])
    writer.add_context_length(config["max_context"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(4 * config["hidden_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["top_k"])
    writer.add_head_count(config["num_heads"])
    writer.add_head_count_kv(config["num_kv_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [tokenizer.id_to_token(n) for n in range(config["vocab_size"])]
    kinds = dict.fromkeys(CONTROL, CONTROL_TYPE) | dict.fromkeys(USER_DEFINED, USER_TYPE)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token, NORMAL) for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens.index(IM_END))
    writer.add_pad_token_id(tokens.index(END_OF_TEXT))
    writer.add_bos_token_id(tokens.index(END_OF_TEXT))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def write(run: Path, out: Path) -> int:
    """Write the file and return its size in bytes."""
    config = json.loads((run / "results.json").read_text(encoding="utf-8"))["config"]
    tensors = gguf_tensors(load_weights(run), config)
    writer = GGUFWriter(out, "qwen3moe")
    add_metadata(writer, config, Tokenizer.from_file(str(run / "tokenizer.json")))
    for name, value in tensors.items():
        kind = type_of(name, config["num_layers"])
        if kind == "F32":
            writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
        else:
            writer.add_tensor(name, quantize(value, kind), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out.stat().st_size


def main() -> None:
    """Read --run, write --out."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--run", type=Path, required=True, help="--out folder of train.py")
    p.add_argument("--out", type=Path, required=True, help="the GGUF to write")
    args = p.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{args.out}: {write(args.run, args.out) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
