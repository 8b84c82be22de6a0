"""The built-in demo model: what `python -m kt_async` serves when no model is named.

The trained one is packaged as `kt_async/data/demo.gguf`. Without it (a trimmed installation) a
small random Qwen3MoE is written once into the user's cache: real but for the sense of its text.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from kt_async.errors import ConfigError
from kt_async.model.spec import ModelSpec, RopeSpec
from kt_async.model.synthetic import metadata_from_spec, random_tensors
from kt_async.text.template import CHATML
from kt_async.weights.writer import write_gguf

# The trained model of the wheel and the repository; how it was made: bench/demo_model.
PACKAGED = Path(str(files("kt_async"))) / "data" / "demo.gguf"
# The number in the name changes whenever the generated file does.
_FILE_NAME = "demo-random-2.gguf"
_VOCAB_SIZE = 768

DEMO_SPEC = ModelSpec(
    architecture="qwen3moe",
    name="kt-async-demo",
    num_layers=4,
    hidden_size=256,
    vocab_size=_VOCAB_SIZE,
    max_context=8192,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    v_head_dim=64,
    rms_eps=1e-6,
    rope=RopeSpec(theta=1e6, dim=64),
    intermediate_size=768,
    num_experts=16,
    top_k=4,
    moe_intermediate_size=256,
    qk_norm=True,
)

# Qwen's special tokens: name -> GGUF token type (3 control, 4 user defined).
_SPECIALS = {
    "<|endoftext|>": 3,
    "<|im_start|>": 3,
    "<|im_end|>": 3,
    "<tool_call>": 4,
    "</tool_call>": 4,
    "<think>": 4,
    "</think>": 4,
}

# The vocabulary is trained on this, so that everyday English takes about three bytes a token.
_TEXT = """
The quick start is short: build the library, start the server, and ask it a question. A model of
this kind has many experts in every layer, and a small router that picks a few of them for each
token. Most of the weights rest in memory while only some are read, so the work for one token is
much less than the size of the model would suggest. When several people ask at the same time,
their tokens share one pass over the weights of an expert, and everybody is served sooner.
What is the capital of France? It is Paris. Write a short story about a fox and a dog who were
good friends. Once upon a time there was a little house near the river, and in the house there
lived an old man with his daughter. She said: "I would like to see the world." He did not know
what to say, but he gave her bread, some water, and a warm coat for the winter. On the first day
she went over the hills; on the second day she came to a great forest; on the third day she could
see the sea. Please explain how this works, step by step, in a few simple sentences. First, we
read the numbers 0 1 2 3 4 5 6 7 8 9 10 100 1000 from the list. Then we add them together. Finally
we return the result to the user. def main(): for name in names: print(name); return True
You are a helpful assistant. I think that they have been through a lot of things which nobody
else could understand, because their people never had the right kind of help from the others.
"""


def demo_model_path(cache: Path | None = None) -> Path:
    """Return the demo model's file, writing the random one first where nothing is packaged.

    cache: directory for the generated file, by default `~/.cache/kt_async`. Raises ConfigError
    when it cannot be written there.
    """
    if PACKAGED.exists():
        return PACKAGED
    path = (cache or Path.home() / ".cache" / "kt_async") / _FILE_NAME
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_demo_model(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: the demo model cannot be written ({error.strerror}); "
            "name a model with --gguf_path."
        ) from None
    return path


def write_demo_model(path: Path, seed: int = 1) -> None:
    """Write the random demo model, always the same bytes for a seed; the file appears whole."""
    metadata = metadata_from_spec(DEMO_SPEC) | _tokenizer_metadata()
    write_gguf(path, metadata, random_tensors(DEMO_SPEC, _recipe, seed, tile_bytes=1 << 18))


def _recipe(name: str, layer: int, num_layers: int) -> str:
    """Choose types as a Q4_K_M file does, plus F32 and Q8_0, so that each kind is exercised."""
    if "ffn_gate_inp" in name:
        return "F32"
    if name in ("token_embd.weight", "output.weight"):
        return "Q8_0" if name.startswith("token") else "Q6_K"
    more_bits = layer < num_layers // 2 and ("attn_v" in name or "ffn_down" in name)
    return "Q6_K" if more_bits else "Q4_K"


def _tokenizer_metadata() -> dict[str, Any]:
    """Train the byte-level vocabulary and return it with the chat template as GGUF keys."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE - len(_SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT.replace("\n", " ")], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [" ".join(merge) for merge in model["merges"]]
    types = [1] * len(tokens) + list(_SPECIALS.values())
    tokens += _SPECIALS
    for index in range(len(tokens), _VOCAB_SIZE):
        tokens.append(f"[PAD{index}]")
        types.append(5)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.bos_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }
