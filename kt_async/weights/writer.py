"""Write GGUF files: a header from plain Python values, then tensors streamed chunk by chunk.

Used by the demo model, benches and tests; nothing is held in memory, so a file may be larger than
RAM. The file appears under its name only when it is complete.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kt_async.weights.gguf_header import TYPES

_ALIGNMENT = 32
_DTYPES = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "u8": 10, "i8": 11}


@dataclass(frozen=True, slots=True)
class TensorData:
    """One tensor to write. shape: row-major; chunks: its bytes in order, any sizes."""

    name: str
    type: int
    shape: tuple[int, ...]
    chunks: Iterable[Any]

    @property
    def num_bytes(self) -> int:
        """Size in the file without padding."""
        _, block, block_bytes = TYPES[self.type]
        count = 1
        for dim in self.shape:
            count *= dim
        return count // block * block_bytes


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Sequence[TensorData]) -> None:
    """Write a GGUF v3 file atomically.

    metadata: str, bool, int, float, list of str or numpy array values. Raises ValueError when a
    tensor's chunks do not add up to its size.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(_header(metadata, tensors))
            _pad(file)
            for tensor in tensors:
                start = file.tell()
                for chunk in tensor.chunks:
                    file.write(chunk)
                if file.tell() - start != tensor.num_bytes:
                    raise ValueError(
                        f"tensor {tensor.name}: {file.tell() - start} bytes written, "
                        f"{tensor.num_bytes} declared"
                    )
                _pad(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


def _header(metadata: Mapping[str, Any], tensors: Sequence[TensorData]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(value)]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]  # GGUF names the fastest dimension first
        parts += [
            _string(tensor.name),
            struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type, offset),
        ]
        offset += -(-tensor.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return b"".join(parts)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """Encode one metadata value with its type in front."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        if value < 0:
            return struct.pack("<Ii", 5, value)
        return struct.pack("<II", 4, value) if value < 1 << 32 else struct.pack("<IQ", 10, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, np.ndarray):
        kind = _DTYPES[value.dtype.str[1:]]
        return struct.pack("<IIQ", 9, kind, value.size) + value.tobytes()
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(_string(item) for item in value)
