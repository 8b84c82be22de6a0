"""Models without a file: the shape of a GGUF header or of a Hugging Face config, weights of noise.

For `--load_format dummy` and bench/gpu.py: a model of any size can be timed where its file would
not fit or was never downloaded. A tensor is filled when its bytes are asked for and given back
when it is released, so that memory holds the packed weights and little else. The noise is that of
`model.synthetic`: activations keep a sane scale, the text is nonsense.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kt_async.errors import ConfigError
from kt_async.model.hf_config import spec_from_hf
from kt_async.model.spec import ModelSpec
from kt_async.model.synthetic import Noise, metadata_from_spec, recipe_for, tensor_types
from kt_async.text.hf_files import read_json
from kt_async.text.pretokenize import BYTES
from kt_async.text.template import CHATML
from kt_async.weights.gguf_header import TYPES, Header, TensorInfo
from kt_async.weights.source import ModelFiles, open_model

_DEFAULT_QUANT = "Q4_K_M"
_SEED = 1


class DummyFiles(ModelFiles):
    """ModelFiles whose bytes are made up when they are asked for."""

    def __init__(
        self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> None:
        """path: what stands for the model in messages. Raises ConfigError naming a tensor of a
        type that cannot be made."""
        super().__init__({}, [Header(dict(metadata), dict(tensors))])
        self.paths = (path,)
        self.total_bytes = sum(info.num_bytes for info in tensors.values())
        self._noise = Noise(_SEED)
        self._filled: dict[str, npt.NDArray[np.uint8]] = {}
        for info in tensors.values():
            if not Noise.can_make(info.type_name):
                raise ConfigError(
                    f"{path}: tensor '{info.name}' has type {info.type_name}, of which "
                    "--load_format dummy cannot make random blocks."
                )

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """Random bytes [num_bytes], the same until `release`."""
        found = self._filled.get(name)
        if found is None:
            info = self.tensors[name]
            found = np.empty(info.num_bytes, np.uint8)
            at = 0
            for chunk in self._noise.chunks(name, info.type, info.shape):
                found[at : at + len(chunk)] = chunk
                at += len(chunk)
            self._filled[name] = found
        return found

    def prefetch(self, name: str) -> None:
        """Nothing lies on a disk."""

    def release(self, name: str) -> None:
        """Give the memory back; reading the tensor again gives other bytes of the same kind."""
        self._filled.pop(name, None)

    def close(self) -> None:
        """Forget the bytes."""
        self._filled.clear()


def dummy_from_spec(spec: ModelSpec, quant: str, path: Path) -> DummyFiles:
    """A model of this shape with the types of a quantisation such as Q4_K_M.

    path: what stands for the model in messages. Raises ValueError for an unknown quantisation.
    """
    tensors = {}
    for name, kind, shape in tensor_types(spec, recipe_for(quant)):
        type_name, block, block_bytes = TYPES[kind]
        size = int(np.prod(shape, dtype=np.int64)) // block * block_bytes
        tensors[name] = TensorInfo(name, kind, type_name, shape, path, 0, size)
    return DummyFiles(path, metadata_from_spec(spec) | vocabulary(spec.vocab_size), tensors)


def vocabulary(vocab_size: int) -> dict[str, Any]:
    """Byte-level BPE of a model's size as GGUF keys: bytes, then printable pairs, then triples."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    size = vocab_size - len(specials)
    printable = sorted(char for char, byte in BYTES.items() if 0x20 <= byte < 0x7F)
    tokens, merges = list(BYTES), []
    pairs = [a + b for a, b in itertools.product(printable, repeat=2)]
    longer = ((word, char) for word in pairs for char in printable)
    for left, right in itertools.chain(itertools.product(printable, repeat=2), longer):
        if len(tokens) == size:
            break
        tokens.append(left + right)
        merges.append(f"{left} {right}")
    types = [1] * len(tokens) + [3] * len(specials)
    tokens += specials
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


def open_dummy(gguf_path: Path | None, model_path: Path | None) -> DummyFiles:
    """The model whose header or config.json is given, without reading any weights.

    gguf_path: a GGUF of which only the header need be there, cut off anywhere after it; wins over
    model_path, a folder with config.json. Raises ConfigError naming the file at fault.
    """
    if gguf_path is not None:
        files = open_model(gguf_path, header_only=True)
        found = DummyFiles(files.path, files.metadata, files.tensors)
        files.close()
        return found
    assert model_path is not None, "a model or a folder"
    config = read_json(model_path / "config.json")
    if not config:
        raise ConfigError(
            f"{model_path}: holds no config.json, from which --load_format dummy takes the shape."
        )
    spec = spec_from_hf(config, str(model_path))
    return dummy_from_spec(spec, _DEFAULT_QUANT, model_path / "config.json")
