"""Read the header of one GGUF file (versions 2 and 3, little endian) in a single pass.

`weights.source` calls this at start-up. The file is untrusted input: every count, length, offset
and type is checked before it is used, whatever it allocates is bounded by the bytes that are
really there, and every defect becomes a ConfigError that names the file. No tensor data is read.

The `gguf` package has a reader too; it wraps every string in numpy objects and needs seconds for
a vocabulary of 150k tokens, this one needs about a tenth of a second.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kt_async.errors import ConfigError

# ggml type -> (name, weights per block, bytes per block). Type 31-33 and 36-38 existed for a
# while as repacked variants and were withdrawn.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
TYPE_IDS: dict[str, int] = {name: number for number, (name, _, _) in TYPES.items()}

# Metadata value types: number -> numpy dtype of a scalar; 8 is string, 9 array.
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING = 8
_ARRAY = 9
_FORMATS = {4: struct.Struct("<I"), 8: struct.Struct("<Q")}

# Bounds far above any real file (the largest have 2 000 tensors, 70 keys and 300 000 strings).
_MAX_ENTRIES = 1 << 18
_MAX_ARRAY = 1 << 22
_MAX_NAME = 4096
_MAX_STRING = 1 << 26
_MAX_HEADER = 1 << 29
_MAX_DIMS = 4
_MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. shape: row-major, e.g. (experts, rows, cols); offset: from the
    start of `file`, in bytes."""

    name: str
    type: int
    type_name: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """One file's metadata (numeric arrays as read-only numpy arrays) and tensors."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path, data: mmap.mmap, *, header_only: bool = False) -> Header:
    """Parse the header of the file mapped as `data`; `path` is used in messages only.

    header_only: tensors may lie beyond the end of the file.
    """
    return _Reader(path, data, header_only).read()


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap, header_only: bool) -> None:
        self.path = path
        self.header_only = header_only
        self.data = data
        self.size = len(data)
        self.pos = 0

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.path}: {problem}.")

    def read(self) -> Header:
        num_tensors, num_keys = self._preamble()
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._text(_MAX_NAME, "a metadata key")
            if key in metadata:
                raise self.error(f"metadata key '{key}' appears twice")
            metadata[key] = self._value(key)
        alignment = metadata.get("general.alignment", 32)
        if (
            not isinstance(alignment, int)
            or not 0 < alignment <= _MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise self.error(f"general.alignment is {alignment}, not a power of two up to 1 MiB")
        entries = [self._tensor() for _ in range(num_tensors)]
        start = -(-self.pos // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for entry in entries:
            name = entry[0]
            if name in tensors:
                raise self.error(f"tensor '{name}' appears twice")
            tensors[name] = self._place(entry, start, alignment)
        return Header(metadata, tensors)

    def _preamble(self) -> tuple[int, int]:
        """Magic, version and the two counts."""
        if self.data[:4] != b"GGUF":
            raise self.error(f"is not a GGUF file (it begins with {self.data[:4]!r})")
        self.pos = 4
        version = self._integer(4)
        if version in (0x02000000, 0x03000000):
            raise self.error("is a big-endian GGUF file; only little-endian ones can be read")
        if version not in (2, 3):
            raise self.error(f"has GGUF version {version}; versions 2 and 3 can be read")
        num_tensors, num_keys = self._integer(8), self._integer(8)
        for count, what in ((num_tensors, "tensors"), (num_keys, "metadata keys")):
            if count > min(_MAX_ENTRIES, self.size // 12):
                raise self.error(f"claims to hold {count} {what}, which cannot be")
        return num_tensors, num_keys

    def _need(self, count: int) -> int:
        """Return the position after `count` more bytes, which must exist."""
        end = self.pos + count
        if end > self.size:
            raise self.error(f"is truncated: its header does not end within {self.size} bytes")
        if end > _MAX_HEADER:
            raise self.error(f"has a header of more than {_MAX_HEADER >> 20} MiB")
        return end

    def _integer(self, num_bytes: int) -> int:
        end = self._need(num_bytes)
        value: int = _FORMATS[num_bytes].unpack_from(self.data, self.pos)[0]
        self.pos = end
        return value

    def _text(self, limit: int, what: str) -> str:
        """Read a name: non-empty, valid UTF-8, at most `limit` bytes."""
        length = self._integer(8)
        if not 0 < length <= limit:
            raise self.error(f"{what} has a length of {length} bytes; 1 to {limit} are allowed")
        end = self._need(length)
        raw = self.data[self.pos : end]
        self.pos = end
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} is not valid UTF-8: {raw[:40]!r}") from None

    def _value(self, key: str) -> Any:
        kind = self._integer(4)
        if kind == _STRING:
            return self._strings(1, key)[0]
        if kind != _ARRAY:
            return self._numbers(kind, 1, key)[0].item()
        kind, count = self._integer(4), self._integer(8)
        if count > _MAX_ARRAY:
            raise self.error(f"metadata key '{key}' claims {count} elements")
        return self._strings(count, key) if kind == _STRING else self._numbers(kind, count, key)

    def _numbers(self, kind: int, count: int, key: str) -> np.ndarray[Any, Any]:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            what = "a nested array" if kind == _ARRAY else f"unknown value type {kind}"
            raise self.error(f"metadata key '{key}' has {what}")
        end = self._need(count * dtype.itemsize)
        raw = self.data[self.pos : end]
        self.pos = end
        values: np.ndarray[Any, Any] = np.frombuffer(raw, dtype)
        if kind == 7:  # any non-zero byte is true; a numpy bool must hold 0 or 1
            values = values.view("u1") != np.uint8(0)
        return values

    def _strings(self, count: int, key: str) -> list[str]:
        """Read `count` strings: the hot loop (150k tokens and as many merges)."""
        data, size, pos = self.data, min(self.size, _MAX_HEADER), self.pos
        unpack = _FORMATS[8].unpack_from
        result: list[str] = []
        append = result.append
        for _ in range(count):
            start = pos + 8
            if start > size:
                break
            length = unpack(data, pos)[0]
            pos = start + length
            if pos > size or length > _MAX_STRING:
                break
            append(str(data[start:pos], "utf-8", "replace"))
        if len(result) != count:
            raise self.error(
                f"is truncated or damaged: metadata key '{key}' needs {count} strings, "
                f"{len(result)} could be read"
            )
        self.pos = pos
        return result

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read (name, row-major shape, type, offset) of one tensor."""
        name = self._text(_MAX_NAME, "a tensor name")
        num_dims = self._integer(4)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self.error(f"tensor '{name}' has {num_dims} dimensions; 1 to 4 are allowed")
        shape = tuple(reversed([self._integer(8) for _ in range(num_dims)]))
        return name, shape, self._integer(4), self._integer(8)

    def _place(
        self, entry: tuple[str, tuple[int, ...], int, int], start: int, alignment: int
    ) -> TensorInfo:
        """Check one tensor's type, shape and place in the file."""
        name, shape, kind, offset = entry
        if kind not in TYPES:
            raise self.error(f"tensor '{name}' has the unknown type {kind}")
        type_name, block, block_bytes = TYPES[kind]
        count = 1
        for dim in shape:
            count *= dim
        if not 0 < count < 1 << 62:
            raise self.error(f"tensor '{name}' has the impossible shape {shape}")
        if shape[-1] % block:
            raise self.error(
                f"tensor '{name}' has rows of {shape[-1]} weights, "
                f"but {type_name} needs a multiple of {block}"
            )
        if offset % alignment:
            raise self.error(f"tensor '{name}' is misaligned: offset {offset} of {alignment}")
        num_bytes = count // block * block_bytes
        begin = start + offset
        if begin + num_bytes > self.size and not self.header_only:
            raise self.error(
                f"is truncated: tensor '{name}' ends at byte {begin + num_bytes}, "
                f"the file at {self.size}"
            )
        return TensorInfo(name, kind, type_name, shape, self.path, begin, num_bytes)
