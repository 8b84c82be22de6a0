"""The routed experts of all layers on the CPU, and GPU steps that hand rows over to them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kt_async.ffi import structs
from kt_async.ffi.lib import check, load
from kt_async.ffi.pool import Pool


@dataclass(frozen=True, slots=True)
class PackedPart:
    """Bands [first_band, first_band + num_bands) of every expert: u8 [experts, expert_bytes]."""

    data: npt.NDArray[np.uint8]
    type: int
    rows: int
    cols: int
    num_bands: int
    first_band: int
    band_bytes: int


def packed_part(native: structs.PackedPart) -> PackedPart:
    """A view of packed memory that belongs to the native side."""
    size = native.num_experts * native.expert_bytes
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(native.data))
    return PackedPart(
        raw.reshape(native.num_experts, native.expert_bytes),
        native.type,
        native.rows,
        native.cols,
        native.num_bands,
        native.first_band,
        native.band_bytes,
    )


def packed_matrix(matrix: ctypes.c_void_p) -> PackedPart:
    """The packed bytes of a kt_matrix; valid until it is destroyed."""
    native = structs.sized(structs.PackedPart)
    check(load().kt_matrix_part(matrix, ctypes.byref(native)))
    return packed_part(native)


class ExpertSet:
    """Packed experts by layer. Close before the pool."""

    def __init__(self, pool: Pool, max_tokens: int, top_k: int) -> None:
        """max_tokens: most rows of one run."""
        self._pool = pool
        self.max_tokens, self.top_k = max_tokens, top_k
        self.caller_cpu = pool.caller_cpu()
        self.num_layers = 0
        self.handle = ctypes.c_void_p()
        check(
            load().kt_expert_set_create(pool.handle, max_tokens, top_k, ctypes.byref(self.handle))
        )

    def add_layer(self, gate: structs.Tensor, up: structs.Tensor, down: structs.Tensor) -> int:
        """Pack a layer's tensors (read during the call only); returns the layer's number."""
        refs = (ctypes.byref(t) for t in (gate, up, down))
        check(load().kt_expert_set_add(self.handle, *refs))
        self.num_layers += 1
        return self.num_layers - 1

    def finish(self) -> None:
        """Allocate the working memory; no layer can be added afterwards."""
        check(load().kt_expert_set_finish(self.handle))

    def parts(self, layer: int, which: int) -> Sequence[PackedPart]:
        """The packed bytes of one tensor (which: KT_EXPERTS_x), one part per NUMA node."""
        found: list[PackedPart] = []
        native = structs.sized(structs.PackedPart, num_parts=1)
        while len(found) < native.num_parts:
            reference = ctypes.byref(native)
            check(load().kt_expert_set_part(self.handle, layer, which, len(found), reference))
            found.append(packed_part(native))
        return found

    def run(
        self,
        layer: int,
        x: npt.NDArray[np.float32],
        ids: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
        out: npt.NDArray[np.float32],
        is_prompt: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        """out [T, H] = weighted sum of each token's experts; arrays are C-contiguous. [engine]

        is_prompt u8 [T]: tokens that are multiplied like a prompt's (None: no token).
        """
        check(
            load().kt_expert_set_run(
                self.handle,
                layer,
                len(x),
                x.ctypes.data,
                ids.ctypes.data,
                weights.ctypes.data,
                out.ctypes.data,
                None if is_prompt is None else is_prompt.ctypes.data,
            )
        )

    def start(self, job: structs.ExpertJob) -> None:
        """Begin a run that ends without the caller's help; its arrays are borrowed. [engine]"""
        check(load().kt_expert_set_start(self.handle, ctypes.byref(job)))

    def join(self) -> bool:
        """Sleep until it has ended, without the GIL; False when none was started. [engine]"""
        return check(load().kt_expert_set_join(self.handle)) == structs.KT_OK

    def close(self) -> None:
        """Free the weights."""
        check(load().kt_expert_set_destroy(self.handle))
        self.handle = ctypes.c_void_p()


class Handoff:
    """Runs GPU steps whose graph hands its routed experts to an ExpertSet.

    Without one the requests of config.num_layers layers are answered at once.
    """

    def __init__(self, config: structs.HandoffConfig, experts: ExpertSet | None) -> None:
        """config: pinned buffers, owned by the caller until close()."""
        self._experts = experts
        self._handle = ctypes.c_void_p()
        handle = None if experts is None else experts.handle
        check(load().kt_handoff_create(ctypes.byref(config), handle, ctypes.byref(self._handle)))

    def wait_in_graph(self, layer: int, stream: int) -> None:
        """Make a stream that is being captured wait for a layer's answer."""
        check(load().kt_handoff_await(self._handle, layer, ctypes.c_void_p(stream)))

    def run(self, step: structs.GpuStep) -> None:
        """One step, to its end, without the GIL. [engine]"""
        check(load().kt_handoff_run(self._handle, ctypes.byref(step)))

    def close(self) -> None:
        """Forget the buffers."""
        check(load().kt_handoff_destroy(self._handle))
        self._handle = ctypes.c_void_p()
