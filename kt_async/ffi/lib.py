"""Load the native library, prove that its layout is ours, and turn status codes into exceptions."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from kt_async.errors import NativeError
from kt_async.ffi import structs

LIBRARY_PATH = Path(__file__).with_name("libkt.so")

_I32 = ctypes.c_int32
_I64 = ctypes.c_int64
_U64 = ctypes.c_uint64
_PTR = ctypes.c_void_p
_STR = ctypes.c_char_p

# Argument types of every function of kt.h; all return int32 unless named in _RETURNS.
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "kt_abi_version": (),
    "kt_abi_fields": (_PTR, _PTR),
    "kt_build_info": (),
    "kt_last_error": (),
    "kt_host_query": (_PTR,),
    "kt_type_query": (_I32, _PTR),
    "kt_dequantize": (_I32, _PTR, _I64, _PTR),
    "kt_pool_create": (_PTR, _PTR),
    "kt_pool_destroy": (_PTR,),
    "kt_pool_caller_cpu": (_PTR, _PTR),
    "kt_pool_describe": (_PTR, _STR, _I32),
    "kt_model_create": (_PTR, _PTR, _PTR),
    "kt_model_destroy": (_PTR,),
    "kt_model_add_buffer": (_PTR, _I32, _I32, _PTR),
    "kt_model_add_weight": (_PTR, _PTR, _I32, _PTR),
    "kt_model_add_op": (_PTR, _PTR),
    "kt_model_finish": (_PTR, _I32),
    "kt_model_run": (_PTR, _PTR, _PTR, _PTR, _PTR),
    "kt_model_read": (_PTR, _I32, _I32, _I32, _PTR),
    "kt_model_query": (_PTR, _PTR),
    "kt_sample": (_PTR, _PTR, _I32, _I32, _PTR, _PTR, _PTR, _PTR),
    "kt_matrix_create": (_PTR, _PTR, _PTR),
    "kt_matrix_destroy": (_PTR,),
    "kt_matrix_unpack": (_PTR, _PTR, _I64),
    "kt_matrix_multiply": (_PTR, _I32, _PTR, _I32, _PTR, _I32),
    "kt_experts_multiply": (_PTR, _PTR, _PTR, _PTR, _PTR, _PTR, _I32, _I32, _PTR, _PTR),
    "kt_bench_read": (_PTR, _I64, _I32, _PTR),
    "kt_bench_peak": (_PTR, _I32, _PTR),
    "kt_expert_set_create": (_PTR, _I32, _I32, _PTR),
    "kt_expert_set_destroy": (_PTR,),
    "kt_expert_set_add": (_PTR, _PTR, _PTR, _PTR),
    "kt_expert_set_finish": (_PTR,),
    "kt_expert_set_part": (_PTR, _I32, _I32, _I32, _PTR),
    "kt_expert_set_run": (_PTR, _I32, _I32, _PTR, _PTR, _PTR, _PTR, _PTR),
    "kt_expert_set_start": (_PTR, _PTR),
    "kt_expert_set_join": (_PTR,),
    "kt_copy_to_device": (_PTR, _PTR, _I32),
    "kt_matrix_part": (_PTR, _PTR),
    "kt_handoff_create": (_PTR, _PTR, _PTR),
    "kt_handoff_destroy": (_PTR,),
    "kt_handoff_await": (_PTR, _I32, _PTR),
    "kt_handoff_run": (_PTR, _PTR),
    "kt_sched_create": (_PTR, _PTR),
    "kt_sched_destroy": (_PTR,),
    "kt_sched_layout": (_PTR, _PTR),
    "kt_sched_submit": (_PTR, _PTR, _I64),
    "kt_sched_cancel": (_PTR, _U64),
    "kt_sched_wait": (_PTR, _I64),
    "kt_sched_wake": (_PTR,),
    "kt_sched_plan": (_PTR, _I64, _PTR, _PTR),
    "kt_sched_commit": (_PTR, _I64, _PTR, _I32),
    "kt_sched_fail": (_PTR, _I64),
    "kt_sched_plan_lane": (_PTR, _I64, _PTR, _PTR),
    "kt_sched_commit_lane": (_PTR, _I64, _PTR, _I32),
    "kt_sched_fail_lane": (_PTR, _I64),
    "kt_sched_drain": (_PTR, _PTR, _I32, _PTR),
    "kt_sched_query": (_PTR, _PTR),
    "kt_sched_journal": (_PTR, _PTR, _I64, _PTR),
    "kt_sched_check": (_PTR,),
}
_RETURNS: dict[str, type] = {"kt_build_info": _STR, "kt_last_error": _STR}


@functools.cache
def load() -> ctypes.CDLL:
    """Load the library once. Raises NativeError when it is missing or of another ABI."""
    if not LIBRARY_PATH.is_file():
        raise NativeError(
            structs.KT_ERR_ABI,
            f"the native library {LIBRARY_PATH} is missing; build it with 'make native'",
        )
    library = ctypes.CDLL(str(LIBRARY_PATH))
    for name, argtypes in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            raise NativeError(
                structs.KT_ERR_ABI,
                f"{LIBRARY_PATH.name} is of another version: it lacks {name}; "
                "rebuild it with 'make native'",
            )
        function.argtypes = argtypes
        function.restype = _RETURNS.get(name, _I32)
    version = library.kt_abi_version()
    if version != structs.KT_ABI_VERSION:
        raise NativeError(
            structs.KT_ERR_ABI,
            f"{LIBRARY_PATH.name} has ABI {version}, this package needs {structs.KT_ABI_VERSION}; "
            "rebuild it with 'make native'",
        )
    differences = layout_differences(library)
    if differences:
        raise NativeError(structs.KT_ERR_ABI, "struct layouts differ: " + "; ".join(differences))
    return library


def mirror_layout() -> dict[tuple[str, str], tuple[int, int]]:
    """Offsets and sizes of our mirrors: (struct, field or "") -> (offset, bytes)."""
    layout: dict[tuple[str, str], tuple[int, int]] = {}
    for mirror in vars(structs).values():
        if isinstance(mirror, type) and issubclass(mirror, ctypes.Structure):
            name = structs.c_name(mirror)
            layout[name, ""] = (0, ctypes.sizeof(mirror))
            for field in mirror._fields_:
                descriptor = getattr(mirror, field[0])
                layout[name, field[0]] = (descriptor.offset, descriptor.size)
    return layout


def library_layout(library: ctypes.CDLL) -> dict[tuple[str, str], tuple[int, int]]:
    """The same table as the library reports it."""
    table = ctypes.POINTER(structs.AbiField)()
    count = _I32()
    library.kt_abi_fields(ctypes.byref(table), ctypes.byref(count))
    return {
        (table[i].struct_name.decode(), table[i].field_name.decode()): (
            table[i].offset,
            table[i].size,
        )
        for i in range(count.value)
    }


def layout_differences(library: ctypes.CDLL) -> list[str]:
    """Every struct field that the two sides see differently, in both directions."""
    ours, theirs = mirror_layout(), library_layout(library)
    return [
        f"{struct}.{field}: python {ours.get((struct, field))}, C {theirs.get((struct, field))}"
        for struct, field in sorted(ours.keys() | theirs.keys())
        if ours.get((struct, field)) != theirs.get((struct, field))
    ]


def check(status: int) -> int:
    """Return a non-negative status; raise NativeError with the library's message otherwise."""
    if status < 0:
        raise NativeError(status, load().kt_last_error().decode(errors="replace"))
    return status
