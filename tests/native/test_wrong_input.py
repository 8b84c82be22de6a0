"""Every entry point with NULL, wrong struct sizes and values out of range: a code and a sentence.

Each pointer, struct and number of a call that works is spoiled in turn; the objects stay usable.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from kt_async.ffi import structs
from kt_async.ffi.lib import _SIGNATURES as SIGNATURES
from tests.native.calls import EXPERTS, STALE, VOCAB, Call, World, creating_calls, repeatable_calls

NO_STATUS = {"kt_abi_version", "kt_build_info", "kt_last_error"}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


# is_prompt; a hand-off without a set
MAY_BE_NULL = {("kt_experts_multiply", 9), ("kt_expert_set_run", 7), ("kt_handoff_create", 1)}


def test_every_call_of_the_table_works(world: World) -> None:
    for call in repeatable_calls(world):
        status, message = call.run()
        assert status == (max(status, 0) if call.status is None else call.status), (
            f"{call.name}: {message}"
        )


def test_null_for_any_pointer_is_refused_by_name(world: World) -> None:
    tried = 0
    for call in repeatable_calls(world) + creating_calls(world):
        for index, kind in enumerate(SIGNATURES[call.name]):
            if kind not in (ctypes.c_void_p, ctypes.c_char_p):
                continue
            if (call.name, index) in MAY_BE_NULL:
                continue
            status, message = call.run(change={index: None})
            assert status == structs.KT_ERR_ARGUMENT, f"{call.name}, argument {index}: {status}"
            assert "is NULL" in message, f"{call.name}, argument {index}: {message}"
            tried += 1
    assert tried > 80
    test_every_call_of_the_table_works(world)


def test_a_struct_of_another_version_is_refused(world: World) -> None:
    for call in repeatable_calls(world) + creating_calls(world):
        for argument in call.args:
            if isinstance(argument, ctypes.Structure):
                argument.struct_size -= 4
                status, message = call.run()
                argument.struct_size += 4
                assert status == structs.KT_ERR_ABI, f"{call.name}: {status}"
                assert "struct_size" in message


def test_nothing_but_zeros_is_refused_everywhere() -> None:
    for name, kinds in SIGNATURES.items():
        if name in NO_STATUS or name.endswith("_destroy"):
            continue
        zeros = [None if kind in (ctypes.c_void_p, ctypes.c_char_p) else 0 for kind in kinds]
        status, message = Call(name, zeros).run()
        if name == "kt_dequantize":  # no weights of type F32: nothing to do
            assert status == structs.KT_OK
            continue
        assert status in (structs.KT_ERR_ARGUMENT, structs.KT_ERR_UNSUPPORTED), name
        assert str(STALE) not in message, name


LOWEST, HIGHEST = -(2**31), 2**31 - 1
OUT_OF_RANGE: list[tuple[str, int, tuple[int, ...], str]] = [
    ("kt_type_query", 0, (-1, 9999, LOWEST), "tensor type"),
    ("kt_dequantize", 0, (-1, 9999), "tensor type"),
    ("kt_dequantize", 2, (-32, 33, -(2**63)), "num_weights is"),
    ("kt_pool_describe", 2, (0, -1, LOWEST), "capacity is"),
    ("kt_bench_read", 1, (0, -1, -(2**63)), "num_bytes is"),
    ("kt_bench_read", 2, (0, -1, 1001), "passes is"),
    ("kt_bench_peak", 1, (-1, 3, LOWEST), "kind is"),
    ("kt_matrix_unpack", 2, (0, -1, -(2**63)), "capacity is"),
    ("kt_matrix_multiply", 1, (-1, EXPERTS, LOWEST, HIGHEST), f"the matrix has {EXPERTS}"),
    ("kt_matrix_multiply", 3, (-1, LOWEST), "num_rows is"),
    ("kt_experts_multiply", 6, (-1, LOWEST, HIGHEST), "num_tokens"),
    ("kt_experts_multiply", 7, (0, -1, EXPERTS + 1, LOWEST), "top_k is"),
    ("kt_expert_set_part", 1, (-1, 1, LOWEST), "layer is"),
    ("kt_expert_set_part", 2, (-1, 3, LOWEST), "which is"),
    ("kt_expert_set_part", 3, (-1, 1, HIGHEST), "part is"),
    ("kt_expert_set_run", 1, (-1, 1, LOWEST, HIGHEST), "layer is"),
    ("kt_expert_set_run", 2, (-1, 5, LOWEST, HIGHEST), "num_tokens is"),
    ("kt_expert_set_create", 1, (0, -1, HIGHEST), "max_tokens is"),
    ("kt_expert_set_create", 2, (0, -1, 65), "top_k is"),
    ("kt_model_add_buffer", 1, (0, -1, LOWEST), "width"),
    ("kt_model_add_buffer", 2, (-1, 2), "by_sample"),
    ("kt_model_add_weight", 2, (-1, 3, LOWEST), "kind is"),
    ("kt_model_read", 1, (-1, 2, LOWEST), "buffer"),
    ("kt_model_read", 2, (-1, 8, LOWEST, HIGHEST), "rows"),
    ("kt_model_read", 3, (-1, 9, LOWEST, HIGHEST), "rows"),
    ("kt_sample", 2, (0, -1), "vocab"),
    ("kt_sample", 3, (0, -1, VOCAB + 1), "vocab"),
    ("kt_sched_drain", 2, (-1, LOWEST), "capacity"),
    ("kt_sched_journal", 2, (-1, -(2**63)), "capacity"),
]


@pytest.mark.parametrize(
    ("name", "index", "values", "text"), OUT_OF_RANGE, ids=[f"{r[0]}-{r[1]}" for r in OUT_OF_RANGE]
)
def test_numbers_out_of_range(
    name: str, index: int, values: tuple[int, ...], text: str, world: World
) -> None:
    found = [c for c in repeatable_calls(world) + creating_calls(world) if c.name == name]
    for value in values:
        status, message = found[0].run(change={index: value})
        assert status in (structs.KT_ERR_ARGUMENT, structs.KT_ERR_UNSUPPORTED), (value, status)
        assert text in message, (value, message)


@pytest.mark.parametrize("bad", [-1, EXPERTS, LOWEST, HIGHEST])
def test_expert_ids_out_of_range(bad: int, world: World) -> None:
    """-1 means "computed elsewhere" for an expert set, and nothing for single layers."""
    ids = np.array([[0, 3], [bad, 2]], np.int32)
    for call in repeatable_calls(world):
        if call.name not in ("kt_experts_multiply", "kt_expert_set_run"):
            continue
        status, message = call.run(change={call.args.index(world.ids): ids.ctypes.data})
        if bad == -1 and call.name == "kt_expert_set_run":
            assert status == structs.KT_OK
            continue
        assert status == structs.KT_ERR_ARGUMENT
        assert str(bad) in message
        assert f"0 .. {EXPERTS - 1}" in message


TENSORS: list[tuple[dict[str, int], int, str]] = [
    ({"type": 9999}, structs.KT_ERR_UNSUPPORTED, "type 9999 has no kernel"),
    ({"type": int(T.Q8_K)}, structs.KT_ERR_UNSUPPORTED, "has no kernel"),
    ({"num_bytes": 7}, structs.KT_ERR_ARGUMENT, "num_bytes is 7, expected"),
    ({"num_bytes": -1}, structs.KT_ERR_ARGUMENT, "num_bytes is -1, expected"),
    ({"rows": 0}, structs.KT_ERR_ARGUMENT, "at least 1"),
    ({"rows": LOWEST}, structs.KT_ERR_ARGUMENT, "at least 1"),
    ({"cols": 33}, structs.KT_ERR_ARGUMENT, "not a multiple"),
    ({"num_experts": -3}, structs.KT_ERR_ARGUMENT, "at least 1"),
    ({"data": 0}, structs.KT_ERR_ARGUMENT, "data is NULL"),
]


@pytest.mark.parametrize(("change", "expected", "text"), TENSORS, ids=str)
def test_damaged_tensors(change: dict[str, int], expected: int, text: str, world: World) -> None:
    """Through every entry point that takes a tensor, at every place of one."""
    damaged = structs.Tensor.from_buffer_copy(world.tensors[0])
    for field, value in change.items():
        setattr(damaged, field, value)
    takers = ("kt_matrix_create", "kt_model_add_weight", "kt_expert_set_add")
    for call in repeatable_calls(world) + creating_calls(world):
        places = [i for i, a in enumerate(call.args) if isinstance(a, structs.Tensor)]
        assert bool(places) == (call.name in takers)
        for place in places:
            status, message = call.run(change={place: damaged})
            assert status == expected, (call.name, place, status)
            assert text in message, (call.name, place, message)


def test_calls_out_of_order(world: World) -> None:
    """A set or model that is not finished cannot run, a finished one cannot be added to."""
    runs = {c.name: c for c in repeatable_calls(world)}
    pairs = (
        ("kt_expert_set_run", world.open_set),
        ("kt_model_run", world.open_model),
        ("kt_model_read", world.open_model),
        ("kt_expert_set_add", world.set),
        ("kt_model_add_buffer", world.model),
        ("kt_model_add_weight", world.model),
    )
    for name, handle in pairs:
        status, message = runs[name].run(change={0: handle})
        assert status == structs.KT_ERR_STATE, (name, status, message)
        assert "finished" in message, name
    for name in ("kt_expert_set_finish", "kt_model_finish"):
        handle = world.set if "set" in name else world.model
        args = [handle] if "set" in name else [handle, 1]
        assert Call(name, args).run()[0] == structs.KT_ERR_STATE


def test_commits_without_a_plan(world: World) -> None:
    tokens = world.keep(np.zeros(4, np.int32))
    for name, args in (
        ("kt_sched_commit", [1, tokens, 1]),
        ("kt_sched_fail", [1]),
        ("kt_sched_commit_lane", [1, tokens, 1]),
        ("kt_sched_fail_lane", [1]),
    ):
        status, message = Call(name, [world.sched, *args]).run()
        assert status == structs.KT_ERR_STATE, (name, status)
        assert str(STALE) not in message


def test_zero_rows_are_nothing_to_do(world: World) -> None:
    for name, index in (("kt_matrix_multiply", 3), ("kt_experts_multiply", 6)):
        call = next(c for c in repeatable_calls(world) if c.name == name)
        assert call.run(change={index: 0})[0] == structs.KT_OK
    call = next(c for c in repeatable_calls(world) if c.name == "kt_expert_set_run")
    assert call.run(change={2: 0})[0] == structs.KT_OK


def test_handoffs_that_fit_nothing(world: World) -> None:
    create = next(c for c in creating_calls(world) if c.name == "kt_handoff_create")
    status, message = create.run()
    assert (status, "num_layers is 0, the expert set has 1" in message) == (-1, True), message
    for field, value, text in (
        ("mechanism", 3, "mechanism is 3"),
        ("mechanism", -1, "mechanism is -1"),
        ("num_layers", 1, "buffer is NULL"),
    ):
        config = structs.HandoffConfig.from_buffer_copy(world.handoff_config)
        setattr(config, field, value)
        status, message = create.run(change={0: config})
        assert status == structs.KT_ERR_ARGUMENT
        assert text in message
    for layer in (0, -1):
        status, message = Call("kt_handoff_await", [world.handoff, layer, None]).run()
        assert status == structs.KT_ERR_ARGUMENT
        assert f"layer is {layer}" in message
