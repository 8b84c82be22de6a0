"""Load a recorded program's weights into the native library, with progress.

Tensors are packed one by one in the order they lie in the file (sequential reads), the next one is
read ahead, and the pages of a packed one are dropped, so that memory peaks at the packed weights
plus one tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

import numpy as np
from tqdm import tqdm

from kt_async.errors import ConfigError, NativeError
from kt_async.ffi import structs
from kt_async.ffi.matrix import type_info
from kt_async.ffi.model import CpuModel
from kt_async.weights.source import ModelFiles

WeightUse = tuple[str, int]  # (tensor name, KT_WEIGHT_x)


def check_types(files: ModelFiles, names: Iterable[str]) -> None:
    """Raise ConfigError for the first tensor of a type that the native library cannot compute with.

    Before anything is loaded: a large model must not be refused at its last tensor.
    """
    usable: dict[int, bool] = {}
    for name in names:
        info = files.tensors[name]
        if info.type not in usable:
            try:
                usable[info.type] = type_info(info.type).has_kernel > 0
            except NativeError:
                usable[info.type] = False
        if not usable[info.type]:
            raise ConfigError(
                f"{info.file}: tensor '{name}' has type {info.type_name}, which is not supported."
            )


def load_weights(
    model: CpuModel,
    files: ModelFiles,
    uses: Iterable[WeightUse],
    constants: Mapping[str, np.ndarray],
    *,
    show_progress: bool | None = None,
) -> dict[WeightUse, int]:
    """Add every weight to the model; returns the native weight ids.

    uses: tensors of `files`, or names in `constants` (f32 vectors computed at start-up).
    show_progress: None = only on a terminal. Raises ConfigError naming the tensor.
    """
    ids: dict[WeightUse, int] = {}
    pending: list[WeightUse] = []
    for use in uses:
        if use[0] in constants:
            ids[use] = model.add_vector(np.ascontiguousarray(constants[use[0]], dtype=np.float32))
        else:
            pending.append(use)
    tensors = files.tensors
    pending.sort(key=lambda use: (str(tensors[use[0]].file), tensors[use[0]].offset))
    total = sum(tensors[name].num_bytes for name, _ in pending)
    disable = not sys.stderr.isatty() if show_progress is None else not show_progress
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=disable) as bar:
        for index, (name, kind) in enumerate(pending):
            if index + 1 < len(pending):
                files.prefetch(pending[index + 1][0])
            info = tensors[name]
            try:
                ids[name, kind] = model.add_weight(info, files.address(name), kind)
            except NativeError as error:
                raise ConfigError(f"{info.file}: tensor '{name}': {error}") from error
            if kind != structs.KT_WEIGHT_BORROW:
                files.release(name)
            bar.update(info.num_bytes)
    return ids
