"""Write GGUF files of real models' shapes with random weights: speed without a download.

    python -m bench.synthetic /data/q3.gguf --shape qwen3-30b-a3b --quant Q4_K_M --layers 6

The blocks are noise of a sane scale, the types are those of the real files (mixed within a layer
as llama-quantize mixes them), the vocabulary has the real size and decodes to printable text.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `kt_async`, when run as a script

from kt_async.model.dummy import vocabulary
from kt_async.model.spec import ModelSpec, RopeSpec
from kt_async.model.synthetic import (
    QUANTS,
    metadata_from_spec,
    random_tensors,
    recipe_for,
)
from kt_async.weights.writer import write_gguf

_QWEN3_30B = ModelSpec(
    architecture="qwen3moe",
    name="qwen3-30b-a3b-random",
    num_layers=48,
    hidden_size=2048,
    vocab_size=151936,
    max_context=40960,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    v_head_dim=128,
    rms_eps=1e-6,
    rope=RopeSpec(theta=1e6, dim=128),
    intermediate_size=6144,
    num_experts=128,
    top_k=8,
    moe_intermediate_size=768,
    qk_norm=True,
)
_V2_LITE = ModelSpec(
    architecture="deepseek2",
    name="deepseek-v2-lite-random",
    num_layers=27,
    hidden_size=2048,
    vocab_size=102400,
    max_context=163840,
    num_heads=16,
    num_kv_heads=16,
    head_dim=192,
    v_head_dim=128,
    rms_eps=1e-6,
    rope=RopeSpec(
        theta=10000.0,
        dim=64,
        neox=False,
        scaling="yarn",
        factor=40.0,
        original_context=4096,
        yarn_log_multiplier=0.0707,
    ),
    intermediate_size=10944,
    num_experts=64,
    top_k=6,
    moe_intermediate_size=1408,
    num_shared_experts=2,
    shared_intermediate_size=2816,
    num_dense_layers=1,
    norm_topk=False,
    kv_lora_rank=512,
    nope_head_dim=128,
    rope_head_dim=64,
    extra={"router_bias": False, "absorbed": True},
)
SHAPES = {
    "qwen3-30b-a3b": _QWEN3_30B,
    "qwen3-235b-a22b": replace(
        _QWEN3_30B,
        name="qwen3-235b-a22b-random",
        num_layers=94,
        hidden_size=4096,
        num_heads=64,
        intermediate_size=12288,
        moe_intermediate_size=1536,
    ),
    "qwen1.5-moe-a2.7b": replace(
        _QWEN3_30B,
        architecture="qwen2moe",
        name="qwen1.5-moe-a2.7b-random",
        num_layers=24,
        max_context=8192,
        num_heads=16,
        num_kv_heads=16,
        intermediate_size=5632,
        num_experts=60,
        top_k=4,
        moe_intermediate_size=1408,
        num_shared_experts=1,
        shared_intermediate_size=5632,
        qk_norm=False,
        qkv_bias=True,
        norm_topk=False,
    ),
    "deepseek-v2-lite": _V2_LITE,
    "deepseek-v3": replace(
        _V2_LITE,
        name="deepseek-v3-random",
        num_layers=61,
        hidden_size=7168,
        vocab_size=129280,
        num_heads=128,
        num_kv_heads=128,
        rope=replace(_V2_LITE.rope, yarn_log_multiplier=0.1),
        intermediate_size=18432,
        num_experts=256,
        top_k=8,
        moe_intermediate_size=2048,
        num_shared_experts=1,
        shared_intermediate_size=2048,
        num_dense_layers=3,
        scoring="sigmoid",
        norm_topk=True,
        expert_scale=2.5,
        expert_groups=8,
        expert_groups_used=4,
        q_lora_rank=1536,
        extra={"router_bias": True, "absorbed": True},
    ),
}


def write_random_gguf(
    path: Path,
    shape: str | ModelSpec,
    quant: str = "Q4_K_M",
    *,
    layers: int | None = None,
    seed: int = 1,
) -> int:
    """Write the model and return its size in bytes.

    shape: a name of SHAPES or a spec. layers: keep only so many. Raises ValueError for unknown
    names and OSError when the disk has no room.
    """
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise ValueError(f"shape '{shape}' is unknown; known are {', '.join(SHAPES)}")
        shape = SHAPES[shape]
    spec = replace(shape, num_layers=layers) if layers else shape
    tensors = random_tensors(spec, recipe_for(quant), seed)
    size = sum(tensor.num_bytes for tensor in tensors)
    free = shutil.disk_usage(path.parent).free
    if size > free - (1 << 30):
        raise OSError(f"{path}: needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    write_gguf(path, metadata_from_spec(spec) | vocabulary(spec.vocab_size), tensors)
    return path.stat().st_size


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description="Write a random model of a real shape.")
    parser.add_argument("path", type=Path, help="GGUF file to write")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-30b-a3b")
    parser.add_argument("--quant", choices=QUANTS, default="Q4_K_M")
    parser.add_argument("--layers", type=int, help="keep only so many layers")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        size = write_random_gguf(
            args.path, args.shape, args.quant, layers=args.layers, seed=args.seed
        )
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    took = time.perf_counter() - start
    print(f"{args.path}: {size / 1e9:.2f} GB in {took:.1f} s ({size / took / 1e9:.2f} GB/s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
