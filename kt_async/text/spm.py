"""SentencePiece vocabularies from GGUF: an equivalent model is built in memory.

The `sentencepiece` package does the work, so its merges, byte fallback and normalisation are
exact; this file only writes the protocol-buffer message it loads (field numbers as in
sentencepiece_model.proto).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import sentencepiece

from kt_async.errors import ConfigError
from kt_async.text.metadata import Metadata

_UNKNOWN = 2  # piece types have the same numbers in GGUF
_UNUSED = 5
_BYTE = 6
_BPE = 2
_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")


def processor_from_gguf(metadata: Metadata, tokens: Sequence[str], types: Sequence[int]) -> Any:
    """Return a SentencePieceProcessor for the vocabulary in GGUF metadata.

    types: token type per token. Raises ConfigError when scores are missing or sentencepiece
    refuses the model.
    """
    scores = metadata.numbers("scores", len(tokens))
    if scores is None:
        raise ConfigError(f"{metadata.source}: the vocabulary has no scores.")
    model = _model_proto(metadata, tokens, scores.tolist(), types)
    return load_processor(model, metadata.source)


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
    if kind == _BYTE and _BYTE_PIECE.fullmatch(piece):
        return bytes([int(piece[3:-1], 16)])
    return piece.replace("\u2581", " ").encode()


def _model_proto(
    metadata: Metadata, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> bytes:
    unknown = metadata.token_id("unknown", len(tokens))
    if unknown is None:
        unknown = types.index(_UNKNOWN) if _UNKNOWN in types else 0
    # sentencepiece wants exactly one unknown piece; some files mark several.
    kinds = [_UNUSED if kind == _UNKNOWN else kind for kind in types]
    kinds[unknown] = _UNKNOWN
    parts = [_message(1, _piece(*row)) for row in zip(tokens, scores, kinds, strict=True)]
    bos, eos = (metadata.token_id(name, len(tokens)) for name in ("bos", "eos"))
    trainer = (
        _number(3, _BPE)
        + _number(35, int(_BYTE in kinds))  # byte_fallback
        + _number(40, unknown)
        + _number(41, -1 if bos is None else bos)
        + _number(42, -1 if eos is None else eos)
        + _number(43, -1)  # no padding piece
    )
    normalizer = (
        _message(2, metadata.raw("precompiled_charsmap"))
        + _number(3, int(metadata.flag("add_space_prefix", default=True)))
        + _number(4, int(metadata.flag("remove_extra_whitespaces", default=False)))
        + _number(5, 1)  # escape_whitespaces
    )
    return b"".join([*parts, _message(2, trainer), _message(3, normalizer)])


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
