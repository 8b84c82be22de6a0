"""Judge a finished GGUF: the held-out questions over HTTP, and the loss of the quantised weights.

    python -m kt_async --gguf_path demo.gguf --port 10002 &
    python -m bench.demo_model.evaluate --url http://127.0.0.1:10002/v1
    python -m bench.demo_model.evaluate --gguf demo.gguf --run DIR     # transformers, float32

The second form decodes the file with the gguf package, runs transformers' Qwen3MoeForCausalLM on
it and on the float weights of a training run, and prints both perplexities.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import urllib.request
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer

from bench.demo_model import corpus, measure
from bench.demo_model.model import DemoConfig
from bench.demo_model.write_gguf import load_weights

HELD_OUT_SEED = 9_000_000


def ask(url: str, question: str, limit: int = 160) -> str:
    """The greedy answer of a running server."""
    body = {
        "model": "demo", "temperature": 0, "max_tokens": limit,
        "messages": [{"role": "user", "content": question}],
    }  # fmt: skip
    request = urllib.request.Request(
        url.rstrip("/") + "/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def over_http(url: str, which: str, show: bool) -> dict[str, str]:
    """Ask all questions of a set, four at a time; returns what to print."""
    items = [q for q in measure.load_questions() if which in ("all", q["set"])]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda q: ask(url, q["ask"]), items))
    flags = [f["flag"] for f in yaml.safe_load((measure.HERE / "flags.yaml").read_text("utf-8"))]
    right = [measure.is_right(a, q["key"]) for q, a in zip(items, answers, strict=True)]
    wrong = [name for a in answers for name in measure.wrong_flags(a, flags)]
    for item, answer, is_right in zip(items, answers, right, strict=True):
        if show and not is_right:
            print(f"[{item['set']} {item['about']}] {item['ask']} -> {answer}")
    return {"right": f"{sum(right)} of {len(items)}", "wrong flag names": str(wrong)}


@torch.no_grad()
def hf_perplexity(state: dict[str, torch.Tensor], tokenizer: Tokenizer, documents: int) -> Any:
    """Perplexities of transformers' Qwen3MoE with these weights on generated held-out text."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: PLC0415 - slow, only here

    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**DemoConfig().as_hf())).float().eval()
    model.load_state_dict(fuse_experts(state, model.state_dict()))
    rows = corpus.build(tokenizer, HELD_OUT_SEED, documents, 1024, 1)
    loss, count = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for ids, weight, doc in measure.batches(rows, 1, "cpu"):
        for number in range(1, int(doc.max()) + 1):  # one document at a time: plain causal
            pick = doc[0] == number
            logits = model(ids[:, pick]).logits
            part = measure.perplexity(logits, ids[:, pick], doc[:, pick], weight[:, pick])
            loss, count = loss + part[0], count + part[1]
    return measure.summary(loss, count)


def fuse_experts(
    state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Stack experts into gate_up_proj and down_proj where this transformers version has them so."""
    if all(name in state for name in wanted):
        return state
    out = {name: value for name, value in state.items() if ".experts." not in name}
    for name in wanted:
        if name.endswith("experts.gate_up_proj"):
            base = name.removesuffix("gate_up_proj")
            out[name] = torch.stack([
                torch.cat([state[f"{base}{e}.gate_proj.weight"], state[f"{base}{e}.up_proj.weight"]])
                for e in range(wanted[name].shape[0])
            ])  # fmt: skip
        elif name.endswith("experts.down_proj"):
            base = name.removesuffix("down_proj")
            experts = range(wanted[name].shape[0])
            out[name] = torch.stack([state[f"{base}{e}.down_proj.weight"] for e in experts])
    return out


def gguf_state(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a GGUF, decoded exactly, under Hugging Face names."""
    from gguf import GGUFReader, quants  # noqa: PLC0415 - only here

    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate",
    }  # fmt: skip
    out: dict[str, torch.Tensor] = {}
    for tensor in GGUFReader(path).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        value = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())
        value = value.float().reshape(shape)
        pieces = tensor.name.removesuffix(".weight").split(".")
        if pieces[0] != "blk":
            out[names[pieces[0]] + ".weight"] = value
        elif pieces[2].endswith("_exps"):
            part = pieces[2].removeprefix("ffn_").removesuffix("_exps")
            for e in range(shape[0]):
                base = f"model.layers.{pieces[1]}.mlp.experts.{e}"
                out[f"{base}.{part}_proj.weight"] = value[e]
        else:
            out[f"model.layers.{pieces[1]}.{parts[pieces[2]]}.weight"] = value
    return out


def main() -> None:
    """Print the results of the chosen checks."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--url", help="base URL of a running server, ending in /v1")
    p.add_argument("--set", default="all", choices=("test", "dev", "all"))
    p.add_argument("--show", action="store_true", help="print wrong answers")
    p.add_argument("--gguf", type=Path)
    p.add_argument("--run", type=Path, help="--out folder of train.py")
    p.add_argument("--documents", type=int, default=60, help="held-out conversations to measure")
    args = p.parse_args()
    if args.url:
        print(json.dumps(over_http(args.url, args.set, args.show), indent=1))
    if args.gguf and args.run:
        tokenizer = Tokenizer.from_file(str(args.run / "tokenizer.json"))
        floats = {name: torch.from_numpy(v) for name, v in load_weights(args.run).items()}
        result = {
            "float": hf_perplexity(floats, tokenizer, args.documents),
            "gguf": hf_perplexity(gguf_state(args.gguf), tokenizer, args.documents),
        }
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
