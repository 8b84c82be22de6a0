"""Random models of any supported shape as GGUF: metadata from a spec, quantised blocks as noise.

For the demo model, benches and tests. Weights are random bytes with the scale fields of each
block set so that the dequantised values have a wanted standard deviation; every bit pattern of
the remaining fields is valid. One tile is drawn per tensor kind and repeated, so a file of many
GB is written at the speed of the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kt_async.model.spec import ModelSpec
from kt_async.model.tensors import expected_tensors
from kt_async.weights.gguf_header import TYPE_IDS, TYPES
from kt_async.weights.writer import TensorData

# Where a block keeps its f16 scale fields: type name -> ((byte offset, multiple of d), ...).
# The second one of the asymmetric types is chosen so that the weights average to zero.
_SCALES: dict[str, tuple[tuple[int, float], ...]] = {
    "Q4_0": ((0, 1.0),),
    "Q4_1": ((0, 1.0), (2, -7.5)),
    "Q5_0": ((0, 1.0),),
    "Q5_1": ((0, 1.0), (2, -15.5)),
    "Q8_0": ((0, 1.0),),
    "Q2_K": ((80, 1.0), (82, 1.5)),
    "Q3_K": ((108, 1.0),),
    "Q4_K": ((0, 1.0), (2, 7.5)),
    "Q5_K": ((0, 1.0), (2, 15.5)),
    "Q6_K": ((208, 1.0),),
    "IQ4_NL": ((0, 1.0),),
    "IQ4_XS": ((0, 1.0),),
    "IQ1_S": ((0, 1.0),),
    "IQ2_XXS": ((0, 1.0),),
    "IQ2_XS": ((0, 1.0),),
    "IQ2_S": ((0, 1.0),),
    "IQ3_XXS": ((0, 1.0),),
    "IQ3_S": ((0, 1.0),),
}
# Types whose levels are not symmetric and whose scales are negative in real files too: half of
# the blocks get a negative one, so that the levels' mean cancels.
_SIGNED = frozenset({"Q4_0", "Q5_0", "Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS"})
_TILE_BYTES = 1 << 20

# Mixed recipes: name -> (usual type, type of the matrices that get more bits, output's type).
_MIXES = {
    "Q2_K": ("Q2_K", "Q3_K", "Q6_K"),
    "Q3_K_M": ("Q3_K", "Q5_K", "Q6_K"),
    "Q4_K_S": ("Q4_K", "Q4_K", "Q6_K"),
    "Q4_K_M": ("Q4_K", "Q6_K", "Q6_K"),
    "Q5_K_M": ("Q5_K", "Q6_K", "Q6_K"),
}
QUANTS = (*_MIXES, "Q6_K", "Q8_0", "Q4_0", "Q5_0", "IQ4_XS", "IQ4_NL", "MXFP4",
          "F16", "BF16", "F32")  # fmt: skip

# (tensor name, layer index or -1, number of layers) -> type name
Recipe = Callable[[str, int, int], str]


def random_blocks(
    type_name: str, count: int, std: float, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Return `count` blocks [count, block bytes] whose weights have mean about 0 and this std.

    Raises ValueError for a type this cannot make.
    """
    if type_name in ("F32", "F16", "BF16"):
        values = rng.standard_normal(count, np.float32) * np.float32(std)
        return _float_bytes(type_name, values).reshape(count, -1)
    _, block, block_bytes = TYPES[TYPE_IDS[type_name]]
    blocks = rng.integers(0, 256, (count, block_bytes), np.uint8)
    if type_name == "MXFP4":  # one exponent byte; values are 0 to 6 times 2^(e - 127)
        blocks[:, 0] = np.clip(round(127 + float(np.log2(std / 3.1))), 1, 254)
        return blocks
    if type_name not in _SCALES:
        raise ValueError(f"cannot make random {type_name} blocks")
    _set_scales(type_name, blocks, 1.0)
    scale = std / _measured_std(type_name, blocks[: max(1, 65536 // block)])
    _set_scales(type_name, blocks, scale)
    if type_name in _SIGNED:
        ((offset, _),) = _SCALES[type_name]
        blocks[:, offset + 1] ^= rng.integers(0, 2, count, np.uint8) << 7  # the f16 sign
    return blocks


def _set_scales(type_name: str, blocks: npt.NDArray[np.uint8], scale: float) -> None:
    for offset, factor in _SCALES[type_name]:
        raw = np.array([scale * factor], "<f2").view(np.uint8)
        blocks[:, offset : offset + 2] = raw


def _measured_std(type_name: str, blocks: npt.NDArray[np.uint8]) -> float:
    from gguf import GGMLQuantizationType, quants  # noqa: PLC0415 - 0.2 s to import, rarely used

    values = quants.dequantize(blocks, GGMLQuantizationType[type_name])
    return float(np.std(values))


def _float_bytes(type_name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    if type_name == "F16":
        return values.astype("<f2").view(np.uint8)
    if type_name == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    return values.astype("<f4").view(np.uint8)


class Noise:
    """Random bytes for tensors of any size; tensors of the same type and spread share one tile.

    A tensor starts inside the tile at an offset of its own, so that two tensors, or two experts,
    are not equal.
    """

    def __init__(self, seed: int, tile_bytes: int = _TILE_BYTES) -> None:
        self._rng = np.random.default_rng(seed)
        self._tile_bytes = tile_bytes
        self._tiles: dict[tuple[str, float], npt.NDArray[np.uint8]] = {}

    @staticmethod
    def can_make(type_name: str) -> bool:
        """Whether there are random blocks of this type."""
        return type_name in _SCALES or type_name in ("F32", "F16", "BF16", "MXFP4")

    def chunks(
        self, name: str, kind: int, shape: tuple[int, ...]
    ) -> Iterator[npt.NDArray[np.uint8]]:
        """The tensor's bytes in order, u8 pieces of any size. Norms are not all ones."""
        type_name, block, block_bytes = TYPES[kind]
        if len(shape) == 1 and block == 1:
            values = _vector(name, shape[0], self._rng)
            return iter([_float_bytes(type_name, values).reshape(-1)])
        key = (type_name, _std(name, shape))
        if key not in self._tiles:
            # An odd number of blocks never divides a row or an expert evenly.
            count = self._tile_bytes // block_bytes | 1
            self._tiles[key] = random_blocks(type_name, count, key[1], self._rng)
        start = int(self._rng.integers(len(self._tiles[key])))
        count = 1
        for dim in shape:
            count *= dim
        return _repeat(self._tiles[key], start, count // block)


def tensor_types(spec: ModelSpec, recipe: Recipe) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """(name, ggml type, shape) of every tensor of the model; vectors are F32."""
    for name, shape in expected_tensors(spec).items():
        if len(shape) == 1:
            yield name, TYPE_IDS["F32"], shape
            continue
        layer = int(name.split(".")[1]) if name.startswith("blk.") else -1
        yield name, TYPE_IDS[fitting_type(recipe(name, layer, spec.num_layers), shape[-1])], shape


def random_tensors(
    spec: ModelSpec, recipe: Recipe, seed: int, tile_bytes: int = _TILE_BYTES
) -> list[TensorData]:
    """Return every tensor of the model, drawn so that activations stay near 1 in every layer."""
    noise = Noise(seed, tile_bytes)
    return [
        TensorData(name, kind, shape, noise.chunks(name, kind, shape))
        for name, kind, shape in tensor_types(spec, recipe)
    ]


def recipe_for(quant: str) -> Recipe:
    """Return the types of a quantisation as llama-quantize lays them out: in a mix half of the
    layers get more bits for attn_v and ffn_down. Raises ValueError for an unknown name."""
    if quant not in QUANTS:
        raise ValueError(f"quantisation '{quant}' is unknown; known are {', '.join(QUANTS)}")
    usual, more, output = _MIXES.get(quant, (quant, quant, quant))

    def recipe(name: str, layer: int, num_layers: int) -> str:
        if "ffn_gate_inp" in name:
            return "F32"  # routers are never quantised
        if name == "output.weight":
            return output
        if "attn_v" not in name and "ffn_down" not in name:
            return usual
        eighth = num_layers // 8
        outer = layer < eighth or layer >= 7 * num_layers // 8
        return more if outer or (layer - eighth) % 3 == 2 else usual

    return recipe


def fitting_type(type_name: str, cols: int) -> str:
    """Return the type, or for rows its blocks do not divide the one converters then choose."""
    if cols % TYPES[TYPE_IDS[type_name]][1] == 0:
        return type_name
    if cols % 32 == 0:
        return {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}.get(type_name, "IQ4_NL")
    return "F16"


def _std(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a matrix: keeps activations near 1, makes logits and routing vary."""
    if name == "token_embd.weight":
        return 1.0
    gain = 3.0 if name == "output.weight" or "ffn_gate_inp" in name else 1.0
    return float(gain * shape[-1] ** -0.5)


def _vector(name: str, size: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    noise = rng.standard_normal(size, np.float32) * np.float32(0.1)
    if name.endswith("norm.weight"):
        return noise + np.float32(1.0)
    return noise * np.float32(size**-0.5) if "shexp" in name else noise


def _repeat(tile: npt.NDArray[np.uint8], start: int, count: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield `count` blocks, going round and round the tile from block `start` on."""
    while count:
        part = tile[start : start + count]
        yield part.reshape(-1)
        count -= len(part)
        start = 0


def metadata_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """Return the GGUF keys that `spec_from_gguf` reads back into the same spec."""
    keys: dict[str, Any] = {
        "block_count": spec.num_layers,
        "context_length": spec.max_context,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.v_head_dim or spec.head_dim,
        "attention.layer_norm_rms_epsilon": float(spec.rms_eps),
        "rope.freq_base": float(spec.rope.theta),
        "rope.dimension_count": spec.rope.dim,
        "expert_count": spec.num_experts,
        "expert_used_count": spec.top_k,
        "expert_feed_forward_length": spec.moe_intermediate_size,
        "vocab_size": spec.vocab_size,
    }
    if spec.rope.scaling != "none":
        keys["rope.scaling.type"] = spec.rope.scaling
        keys["rope.scaling.factor"] = float(spec.rope.factor)
    if spec.rope.scaling == "yarn":
        keys["rope.scaling.original_context_length"] = spec.rope.original_context
        keys["rope.scaling.yarn_log_multiplier"] = float(spec.rope.yarn_log_multiplier)
    if spec.architecture == "qwen2moe":
        keys["expert_shared_feed_forward_length"] = spec.shared_intermediate_size
    if spec.architecture == "deepseek2":
        keys |= _deepseek_keys(spec)
    head = {"general.architecture": spec.architecture, "general.name": spec.name}
    return head | {f"{spec.architecture}.{key}": value for key, value in keys.items()}


def _deepseek_keys(spec: ModelSpec) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "leading_dense_block_count": spec.num_dense_layers,
        "attention.kv_lora_rank": spec.kv_lora_rank,
        "attention.q_lora_rank": spec.q_lora_rank,
        "expert_shared_count": spec.num_shared_experts,
        "expert_weights_scale": float(spec.expert_scale),
        "expert_weights_norm": spec.norm_topk,
        "expert_gating_func": 2 if spec.scoring == "sigmoid" else 1,
    }
    if spec.expert_groups:
        keys["expert_group_count"] = spec.expert_groups
        keys["expert_group_used_count"] = spec.expert_groups_used
    if spec.extra.get("absorbed"):
        keys["attention.head_count_kv"] = 1
        keys["attention.key_length"] = spec.kv_lora_rank + spec.rope_head_dim
        keys["attention.value_length"] = spec.kv_lora_rank
        keys["attention.key_length_mla"] = spec.head_dim
        keys["attention.value_length_mla"] = spec.v_head_dim
    return keys
