"""SentencePiece vocabularies from GGUF: an equivalent model is built in memory.

The `sentencepiece` package does the work, so its merges, byte fallback and normalisation are
exact; this file only writes the protocol-buffer message it loads (field numbers as in
sentencepiece_model.proto).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sentencepiece

from kt_async.errors import ConfigError

_UNKNOWN = 2  # piece types have the same numbers in GGUF
_UNUSED = 5
_BYTE = 6
_BPE = 2


def processor_from_gguf(metadata: Mapping[str, Any], source: str) -> Any:
    """Return a SentencePieceProcessor for the vocabulary in GGUF metadata.

    Raises ConfigError when scores or types are missing or sentencepiece refuses the model.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = metadata.get("tokenizer.ggml.scores", ())
    types = metadata.get("tokenizer.ggml.token_type", ())
    if not len(tokens) == len(scores) == len(types):
        raise ConfigError(
            f"{source}: the vocabulary has {len(tokens)} tokens, {len(scores)} scores and "
            f"{len(types)} types; all three must agree."
        )
    return load_processor(_model_proto(metadata, tokens, scores, types), source)


def load_processor(model: bytes, source: str) -> Any:
    """Load a serialised model; raises ConfigError when it is none."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"{source}: sentencepiece refuses the vocabulary ({error}).") from None
    return processor


def piece_to_bytes(piece: str, kind: int) -> bytes:
    """Return the bytes of a piece: '<0x0A>' is one byte, the lower block is a space."""
    if kind == _BYTE:
        return bytes([int(piece[3:-1], 16)])
    return piece.replace("\u2581", " ").encode()


def _model_proto(
    metadata: Mapping[str, Any], tokens: Sequence[str], scores: Sequence[float], types: Any
) -> bytes:
    kinds = [int(kind) for kind in types]
    unknown = int(metadata.get("tokenizer.ggml.unknown_token_id", -1))
    if not 0 <= unknown < len(kinds):
        unknown = kinds.index(_UNKNOWN) if _UNKNOWN in kinds else 0
    # sentencepiece wants exactly one unknown piece; some files mark several.
    kinds = [_UNUSED if kind == _UNKNOWN else kind for kind in kinds]
    kinds[unknown] = _UNKNOWN
    parts = [_message(1, _piece(*row)) for row in zip(tokens, scores, kinds, strict=True)]
    trainer = (
        _number(3, _BPE)
        + _number(35, int(_BYTE in kinds))  # byte_fallback
        + _number(40, unknown)
        + _number(41, _id(metadata, "bos"))
        + _number(42, _id(metadata, "eos"))
        + _number(43, -1)  # no padding piece
    )
    normalizer = (
        _message(2, bytes(metadata.get("tokenizer.ggml.precompiled_charsmap", b"")))
        + _number(3, int(metadata.get("tokenizer.ggml.add_space_prefix", True)))
        + _number(4, int(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)))
        + _number(5, 1)  # escape_whitespaces
    )
    return b"".join([*parts, _message(2, trainer), _message(3, normalizer)])


def _id(metadata: Mapping[str, Any], name: str) -> int:
    return int(metadata.get(f"tokenizer.ggml.{name}_token_id", -1))


def _piece(text: str, score: float, kind: int) -> bytes:
    return _message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind)


def _message(field: int, payload: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(payload)) + payload


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value & 0xFFFFFFFFFFFFFFFF)


def _varint(value: int) -> bytes:
    return bytes(_varint_bytes(value))


def _varint_bytes(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
