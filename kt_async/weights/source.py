"""GGUF models as named, memory-mapped tensors: one file, split files, or a directory.

Start-up opens the model here; `model.spec`, `text.tokenizer` and `weights.loader` read it. Nothing
is copied: `data` is a view of the page cache, and `release` gives its pages back as soon as a
tensor has been packed, so that loading never holds the model twice.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from kt_async.errors import ConfigError
from kt_async.weights.gguf_header import TYPE_IDS, TYPES, Header, TensorInfo, read_header

__all__ = ["TYPES", "TYPE_IDS", "ModelFiles", "TensorInfo", "open_model"]

_SHARD = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class ModelFiles:
    """An opened model. Metadata comes from the first file; tensors from all of them.

    The views that `data` returns keep the mapping alive after `close`. Methods may be called from
    any thread; `close` only when nobody uses `address` any more.
    """

    def __init__(self, files: Mapping[Path, mmap.mmap], headers: list[Header]) -> None:
        self._maps = dict(files)
        self._views = {path: np.frombuffer(data, np.uint8) for path, data in files.items()}
        tensors = {name: info for header in headers for name, info in header.tensors.items()}
        self.paths: tuple[Path, ...] = tuple(files)
        self.metadata: Mapping[str, Any] = MappingProxyType(headers[0].metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.total_bytes: int = sum(view.size for view in self._views.values())

    @property
    def path(self) -> Path:
        """The first file, for messages."""
        return self.paths[0]

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the tensor's bytes as a read-only 1-D view of the mapping."""
        info = self.tensors[name]
        return self._views[info.file][info.offset : info.offset + info.num_bytes]

    def address(self, name: str) -> int:
        """Return where the tensor's bytes lie in this process; valid until `close`."""
        return int(self.data(name).ctypes.data)

    def prefetch(self, name: str) -> None:
        """Ask the kernel to read the tensor ahead; returns at once."""
        self._advise(name, "MADV_WILLNEED", inner=False)

    def release(self, name: str) -> None:
        """Drop the pages that hold nothing but this tensor; reading it again is still correct."""
        self._advise(name, "MADV_DONTNEED", inner=True)

    def close(self) -> None:
        """Forget the mappings; they go away with the last view. May be called twice."""
        self._views.clear()
        self._maps.clear()

    def _advise(self, name: str, advice: str, *, inner: bool) -> None:
        """madvise the pages of a tensor: those fully inside it, or all that it touches."""
        option = getattr(mmap, advice, None)
        if option is None:  # not a Linux system: advice is only ever an optimisation
            return
        info = self.tensors[name]
        page = mmap.PAGESIZE
        end = info.offset + info.num_bytes
        first = -(-info.offset // page) * page if inner else info.offset // page * page
        if inner:
            end = end // page * page
        if end > first:
            self._maps[info.file].madvise(option, first, end - first)


def open_model(path: Path, *, header_only: bool = False) -> ModelFiles:
    """Open a GGUF file, any shard of a split model, or the directory that holds one model.

    header_only: the files may end anywhere after their headers; no tensor may then be read.
    Raises ConfigError with one sentence naming the file (and tensor) for anything wrong.
    """
    files = {shard: _map_file(shard) for shard in _shards(_find(path))}
    headers = [read_header(shard, data, header_only=header_only) for shard, data in files.items()]
    _check_split(list(files), headers)
    return ModelFiles(files, headers)


def _find(path: Path) -> Path:
    """Return a file of the model that `path` means."""
    if not path.is_dir():
        if not path.exists():
            raise ConfigError(f"{path}: there is no such file or directory.")
        return path
    # Sub-directories count only when the directory itself has none: repositories with several
    # quantisations keep one in each. Projector files (mmproj-*) are no models of their own.
    for pattern in ("*.gguf", "*/*.gguf"):
        found = sorted(p for p in path.glob(pattern) if not p.name.startswith("mmproj"))
        models: dict[str, Path] = {}
        for file in found:
            match = _SHARD.fullmatch(file.name)
            models.setdefault(str(file.parent / (match["prefix"] if match else file.name)), file)
        if len(models) == 1:
            return found[0]
        if models:
            names = ", ".join(str(p.relative_to(path)) for p in list(models.values())[:8])
            raise ConfigError(f"{path}: holds {len(models)} models, name one of them: {names}.")
    raise ConfigError(f"{path}: the directory holds no .gguf file.")


def _shards(path: Path) -> list[Path]:
    """Return all files of the model that `path` belongs to, in order; all must exist."""
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count:
        raise ConfigError(f"{path}: the file name has an impossible shard number.")
    names = (f"{match['prefix']}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1))
    shards = [path.with_name(name) for name in names]
    for shard in shards:
        if not shard.exists():
            raise ConfigError(f"{shard}: shard is missing ({count} files make up this model).")
    return shards


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # an empty file cannot be mapped
        raise ConfigError(f"{path}: the file is empty.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None


def _check_split(paths: list[Path], headers: list[Header]) -> None:
    """Check that the shards belong together and hold every tensor once."""
    seen: dict[str, Path] = {}
    for index, (path, header) in enumerate(zip(paths, headers, strict=True)):
        count = _number(path, header, "split.count", 1)
        number = _number(path, header, "split.no", index)
        if count not in (len(paths), 0):
            hint = "" if len(paths) > 1 else "; keep the names NAME-00001-of-0000N.gguf"
            raise ConfigError(
                f"{path}: says it is one of {count} split files, {len(paths)} found{hint}."
            )
        if number != index:
            raise ConfigError(f"{path}: says it is split number {number}, its name says {index}.")
        for name in header.tensors:
            if name in seen:
                raise ConfigError(f"{path}: tensor '{name}' is already in {seen[name].name}.")
            seen[name] = path
    total = _number(paths[0], headers[0], "split.tensors.count", len(seen))
    if total != len(seen):
        raise ConfigError(f"{paths[0]}: needs {total} tensors, its files hold {len(seen)}.")


def _number(path: Path, header: Header, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if not isinstance(value, int):
        raise ConfigError(f"{path}: {key} is not a whole number.")
    return value
