"""One working call of every entry point of the library, for tests that then spoil an argument."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as T

from kt_async.ffi import structs
from kt_async.ffi.lib import load
from tests.native.program_steps import Block, Result, Row, Step, sample_rows
from tests.native.quant_data import random_tensor
from tests.native.sched_sim import make_config

H, INNER, EXPERTS, TOP_K, VOCAB = 64, 32, 4, 2, 40
STALE = -12345  # a number that no other message has


@dataclass
class Call:
    """A call that works: its arguments, and the status it gives."""

    name: str
    args: list[Any]
    status: int | None = structs.KT_OK  # None: any outcome that is no error

    def run(self, *, change: dict[int, Any] | None = None) -> tuple[int, str]:
        """Status and message, with some arguments replaced."""
        args = [(change or {}).get(i, arg) for i, arg in enumerate(self.args)]
        args = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in args]
        # Another message first, so that a refusal without one cannot show that of a call before.
        load().kt_dequantize(STALE, None, 0, None)
        status = getattr(load(), self.name)(*args)
        return status, load().kt_last_error().decode()


class World:
    """One valid object of each kind, and what keeps their memory alive."""

    def __init__(self) -> None:
        self.alive: list[Any] = []
        self.pool = self.create("kt_pool_create", structs.sized(
            structs.PoolConfig, num_threads=2, isa=-1, spin_us=-1))  # fmt: skip
        up, down = (T.Q8_0, INNER, H), (T.Q8_0, H, INNER)
        self.tensors = [self.tensor(*shape, seed) for seed, shape in enumerate((up, up, down))]
        self.matrices = [self.create("kt_matrix_create", self.pool, t) for t in self.tensors]
        self.set = self.create("kt_expert_set_create", self.pool, 4, TOP_K)
        assert load().kt_expert_set_add(self.set, *map(ctypes.byref, self.tensors)) == 0
        assert load().kt_expert_set_finish(self.set) == 0
        self.open_set = self.create("kt_expert_set_create", self.pool, 4, TOP_K)
        self.sched = self.create("kt_sched_create", make_config())
        self.handoff_config = structs.sized(structs.HandoffConfig)  # no layers: no buffers
        self.handoff = self.create("kt_handoff_create", self.handoff_config, None)
        self.open_model = self.create("kt_model_create", self.model_config(), self.pool)
        self.model = self.finished_model()
        self.x, self.weights = self.floats(2, H), self.floats(2, TOP_K)
        self.out = self.floats(2, H)
        self.ids = self.keep(np.array([[0, 3], [1, 2]], np.int32))

    def keep(self, array: np.ndarray) -> int:
        """The array's address; the array stays."""
        self.alive.append(array)
        return int(array.ctypes.data)

    def floats(self, *shape: int) -> int:
        return self.keep(np.ones(shape, np.float32))

    def create(self, name: str, *args: Any) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        status, message = Call(name, [*args, ctypes.byref(handle)]).run()
        assert status == 0, message
        return handle

    def tensor(self, kind: T, rows: int, cols: int, seed: int) -> structs.Tensor:
        raw = np.ascontiguousarray(random_tensor(kind, EXPERTS * rows, cols, seed)).view(np.uint8)
        return structs.tensor_at(kind, (EXPERTS, rows, cols), raw.nbytes, self.keep(raw))

    @staticmethod
    def model_config() -> structs.ModelConfig:
        return structs.sized(
            structs.ModelConfig, max_tokens=8, max_rows=4, max_logit_rows=4, page_size=16,
            num_pages=8, vocab_size=VOCAB, sample_vocab=VOCAB)  # fmt: skip

    def table(self) -> structs.Tensor:
        values = np.ones((VOCAB, VOCAB), np.float32)
        return structs.tensor_at(0, values.shape, values.nbytes, self.keep(values))

    def finished_model(self) -> ctypes.c_void_p:
        """An embedding table whose rows are the logits."""
        model = self.create("kt_model_create", self.model_config(), self.pool)
        ids = [ctypes.c_int32() for _ in range(3)]
        library, table = load(), self.table()
        assert library.kt_model_add_weight(model, ctypes.byref(table), 2, ctypes.byref(ids[0])) == 0
        for by_sample in (0, 1):
            ref = ctypes.byref(ids[1 + by_sample])
            assert library.kt_model_add_buffer(model, VOCAB, by_sample, ref) == 0
        embed = structs.sized(structs.Op, code=structs.KT_OP_EMBED)
        gather = structs.sized(structs.Op, code=structs.KT_OP_GATHER)
        for op in (embed, gather):
            for field in ("in", "out", "w"):
                values = getattr(op, field)
                values[:] = [-1] * len(values)
        embed.w[0], embed.out[0] = ids[0].value, ids[1].value
        getattr(gather, "in")[0], gather.out[0] = ids[1].value, ids[2].value
        for op in (embed, gather):
            assert library.kt_model_add_op(model, ctypes.byref(op)) == 0
        assert library.kt_model_finish(model, ids[2]) == 0
        return model

    def close(self) -> None:
        library = load()
        for model in (self.model, self.open_model):
            library.kt_model_destroy(model)
        for matrix in self.matrices:
            library.kt_matrix_destroy(matrix)
        for experts in (self.set, self.open_set):
            library.kt_expert_set_destroy(experts)
        library.kt_handoff_destroy(self.handoff)
        library.kt_sched_destroy(self.sched)
        library.kt_pool_destroy(self.pool)


def repeatable_calls(w: World) -> list[Call]:
    """At least one working call of every entry point that can be called again and again."""
    pointer, number = ctypes.byref(ctypes.c_void_p()), ctypes.byref(ctypes.c_int32())
    real, wide = ctypes.byref(ctypes.c_double()), ctypes.byref(ctypes.c_int64())
    block, result = Block(Step([(Row([5]), [1, 2, 3])], sample_rows(1))), Result(1)
    w.alive += [block, result]
    step = [block.plan, block.layout, block.bytes.ctypes.data, result.struct]
    memory = w.keep(np.zeros(1 << 16, np.uint8))
    raw = w.tensors[0]
    text = ctypes.create_string_buffer(64)
    sized, ok, idle = structs.sized, structs.KT_OK, structs.KT_IDLE
    table: list[tuple[str, list[Any], int | None]] = [
        ("kt_abi_fields", [pointer, number], ok),
        ("kt_host_query", [sized(structs.HostInfo)], ok),
        ("kt_type_query", [int(T.Q4_K), sized(structs.TypeInfo)], ok),
        ("kt_dequantize", [int(T.Q8_0), raw.data, 64, memory], ok),
        ("kt_pool_describe", [w.pool, text, 64], ok),
        ("kt_pool_caller_cpu", [w.pool, number], ok),
        ("kt_bench_read", [w.pool, 1 << 16, 1, real], ok),
        ("kt_bench_peak", [w.pool, 2, real], ok),
        ("kt_matrix_unpack", [w.matrices[0], memory, raw.num_bytes], ok),
        ("kt_matrix_multiply", [w.matrices[0], 0, w.x, 2, memory, 0], ok),
        ("kt_matrix_part", [w.matrices[0], sized(structs.PackedPart)], ok),
        ("kt_experts_multiply", [*w.matrices, w.x, w.ids, w.weights, 2, TOP_K, w.out, None], ok),
        ("kt_expert_set_part", [w.set, 0, 0, 0, sized(structs.PackedPart)], ok),
        ("kt_expert_set_join", [w.set], idle),
        ("kt_expert_set_run", [w.set, 0, 2, w.x, w.ids, w.weights, w.out, None], ok),
        ("kt_model_run", [w.model, *step], ok),
        ("kt_model_read", [w.model, 0, 0, 1, memory], ok),
        ("kt_model_query", [w.model, sized(structs.ModelStats)], ok),
        ("kt_sample", [w.pool, w.floats(1, VOCAB), VOCAB, VOCAB, *step], ok),
        ("kt_sched_layout", [w.sched, sized(structs.BlockLayout)], ok),
        ("kt_sched_query", [w.sched, sized(structs.SchedStats)], ok),
        ("kt_sched_plan", [w.sched, 1, memory, sized(structs.Plan)], idle),
        ("kt_sched_drain", [w.sched, memory, 8, number], ok),
        ("kt_sched_journal", [w.sched, memory, 8, wide], ok),
        ("kt_sched_check", [w.sched], ok),
        ("kt_sched_wake", [w.sched], ok),
        ("kt_sched_cancel", [w.sched, 77], ok),
        ("kt_sched_wait", [w.sched, 0], None),
        ("kt_model_add_buffer", [w.open_model, 8, 0, number], ok),
        ("kt_model_add_weight", [w.open_model, w.table(), 2, number], ok),
        ("kt_expert_set_add", [w.open_set, *w.tensors], ok),
    ]
    return [Call(*row) for row in table]


def creating_calls(w: World) -> list[Call]:
    """Calls that only their refusals are wanted of: they would make something to be destroyed."""
    new = ctypes.byref(ctypes.c_void_p())
    tokens = w.keep(np.array([1, 2], np.int32))
    request = structs.sized(structs.Request, num_tokens=2, tokens=tokens, seq_id=9, max_tokens=1)
    job = structs.sized(
        structs.ExpertJob,
        num_tokens=2,
        number=1,
        x=w.x,
        ids=w.ids,
        weights=w.weights,
        out=w.out,
        done=w.keep(np.zeros(1, np.uint32)),
    )
    return [
        Call("kt_expert_set_start", [w.set, job]),
        Call("kt_pool_create", [structs.sized(structs.PoolConfig, num_threads=1, isa=-1), new]),
        Call("kt_model_create", [w.model_config(), w.pool, new]),
        Call("kt_matrix_create", [w.pool, w.tensors[0], new]),
        Call("kt_expert_set_create", [w.pool, 4, TOP_K, new]),
        Call("kt_sched_create", [make_config(), new]),
        Call("kt_handoff_create", [w.handoff_config, w.set, new]),  # lacks the set's layer
        Call("kt_sched_submit", [w.sched, request, 1]),
    ]
