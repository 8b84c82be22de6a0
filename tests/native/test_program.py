"""Programs of each operation against numpy, and every refusal of a wrong operation or step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kt_async.errors import NativeError
from kt_async.ffi import structs
from kt_async.ffi.host import ISA_NAMES, query_host
from kt_async.ffi.pool import Pool
from tests.native.program_steps import F32, Block, Program, Result, Row, Step, Tensor, sample_rows

H, VOCAB = 64, 40
ISAS = [ISA_NAMES.index(name) for name in query_host().isas if name != "avx512vnni"]
_GENERATOR = [np.random.default_rng(5)]


def reseed(seed: int) -> None:
    _GENERATOR[0] = np.random.default_rng(seed)


def normal(*shape: int) -> F32:
    return _GENERATOR[0].standard_normal(shape, np.float32)


@pytest.fixture(params=[(1, 1, 0), (3, 1, 0), (4, 2, 0)], ids=["1t", "3t", "4t2n"])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    threads, nodes, _ = request.param
    with Pool(threads, fake_nodes=nodes, pin=False) as opened:
        yield opened


@pytest.fixture
def one() -> Iterator[Pool]:
    with Pool(2, pin=False) as opened:
        yield opened


def run_tokens(program: Program, count: int, samples: int = 0) -> list[int]:
    ids = [(7 * i) % VOCAB for i in range(count)]
    rows = sample_rows(samples)
    rows["token_index"] = np.arange(samples) % count
    program.run(Step([(Row([0, 1, 2, 3]), ids)], rows))
    return ids


@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_embed_norm_linear_and_elementwise(pool: Pool, count: int) -> None:
    """One program with every small operation; each buffer is compared."""
    tables = [normal(VOCAB, H) for _ in range(2)]
    w = {name: normal(rows, H) for name, rows in (("a", 100), ("b", 100), ("g", 1), ("o", H))}
    norm, bias = normal(H), normal(100)
    p = Program(pool, vocab=VOCAB)
    new = p.model.add_buffer
    x, y = (p.embed(t) for t in tables)
    n, grouped = new(H, False), new(H, False)
    a, b, g, o = new(100, False), new(100, False), new(1, False), new(H, False)
    mul, total, gated = new(100, False), new(H, False), new(H, False)
    add = p.model.add_op
    add(
        structs.KT_OP_RMSNORM,
        inputs=[y],
        outputs=[grouped],
        weights=[p.vector(norm[:16])],
        ints=[16],
        floats=[1e-5],
    )
    add(structs.KT_OP_RMSNORM, inputs=[x], outputs=[n], weights=[p.vector(norm)], floats=[1e-6])
    add(structs.KT_OP_LINEAR, inputs=[n], outputs=[a], weights=[p.weight(w["a"]), p.vector(bias)])
    add(structs.KT_OP_LINEAR, inputs=[n], outputs=[b], weights=[p.weight(w["b"])])
    add(structs.KT_OP_LINEAR, inputs=[n, -1], outputs=[g], weights=[p.weight(w["g"])])
    add(structs.KT_OP_SILU_MUL, inputs=[a, b], outputs=[mul])
    add(structs.KT_OP_LINEAR, inputs=[n, y], outputs=[o], weights=[p.weight(w["o"])])
    add(structs.KT_OP_ADD, inputs=[x, o], outputs=[total])
    add(structs.KT_OP_GATE_ADD, inputs=[total, g, y], outputs=[gated])
    p.finish(gated, H)
    ids = run_tokens(p, count, samples=3)
    rx, ry = (t[ids].astype(np.float64) for t in tables)

    def rms(v: Any, weight: Any, eps: float) -> Any:
        return v / np.sqrt((v * v).mean(-1, keepdims=True) + eps) * weight

    rn = rms(rx, norm, 1e-6)
    expected = {
        grouped: rms(ry.reshape(count, 4, 16), norm[:16], 1e-5).reshape(count, H),
        n: rn,
        a: rn @ w["a"].T + bias,
        b: rn @ w["b"].T,
        g: rn @ w["g"].T,
        o: rn @ w["o"].T + ry,
    }
    expected[mul] = expected[a] / (1 + np.exp(-expected[a])) * expected[b]
    expected[total] = rx + expected[o]
    expected[gated] = expected[total] + ry / (1 + np.exp(-expected[g]))
    for buffer, values in expected.items():
        np.testing.assert_allclose(p.read(buffer, count), values, rtol=1e-4, atol=2e-4)
    gathered = expected[gated][np.arange(3) % count]
    np.testing.assert_allclose(p.read(p.logits, 3), gathered[:, :VOCAB], rtol=1e-4, atol=2e-4)
    p.close()


def _experts_program(
    pool: Pool, kind: int, routing: list[int], scale: float, *, bias: F32 | None = None
) -> tuple[Program, int, dict[str, F32]]:
    experts, inner = 8, 48
    w = {
        "router": normal(experts, H),
        "gate": normal(experts, inner, H) * np.float32(0.2),
        "up": normal(experts, inner, H) * np.float32(0.2),
        "down": normal(experts, H, inner) * np.float32(0.2),
        "table": normal(VOCAB, H),
    }
    p = Program(pool, vocab=VOCAB)
    x = p.embed(w["table"])
    out = p.model.add_buffer(H, False)
    matrices = [p.weight(w[name]) for name in ("gate", "up", "down")]
    p.model.add_op(
        structs.KT_OP_MOE,
        inputs=[x, x if kind == 1 else -1],
        outputs=[out],
        weights=[
            p.weight(w["router"], structs.KT_WEIGHT_VECTOR if kind else structs.KT_WEIGHT_MATRIX),
            *matrices,
            -1 if bias is None else p.vector(bias),
        ],
        ints=routing,
        floats=[scale],
    )
    p.finish(out, H)
    return p, out, w


def _experts_twin(
    w: dict[str, F32], x: Any, routing: list[int], scale: float, bias: F32 | None
) -> Any:
    top_k, sigmoid, renormalise, groups, kept, two = routing
    logits = x @ w["router"].T.astype(np.float64)
    if sigmoid:
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    choice = scores + (0 if bias is None else bias)
    if groups:
        grouped = choice.reshape(len(x), groups, -1)
        best = np.sort(grouped, -1)
        score = best[..., -1] + (best[..., -2] if two else 0)
        keep = np.argsort(-score, -1, kind="stable")[:, :kept]
        mask = np.full(grouped.shape, -np.inf)
        for t, groups_kept in enumerate(keep):
            mask[t, groups_kept] = 0
        choice = (grouped + mask).reshape(choice.shape)
    ids = np.argsort(-choice, -1, kind="stable")[:, :top_k]
    out = np.zeros((len(x), w["down"].shape[1]))
    for t, chosen in enumerate(ids):
        weights = scores[t, chosen]
        weights = weights / weights.sum() if renormalise else weights
        for e, weight in zip(chosen, weights * scale, strict=True):
            gate = w["gate"][e] @ x[t]
            inner = gate / (1 + np.exp(-gate)) * (w["up"][e] @ x[t])
            out[t] += weight * (w["down"][e] @ inner)
    return out


ROUTINGS = [
    ([2, 0, 1, 0, 0, 0], 1.0, False),
    ([3, 0, 0, 0, 0, 0], 2.5, False),
    ([2, 0, 0, 4, 2, 0], 16.0, False),
    ([3, 1, 1, 4, 2, 1], 2.5, True),
    ([8, 1, 1, 0, 0, 0], 1.0, True),
]


@pytest.mark.parametrize("count", [1, 2, 9, 64])
@pytest.mark.parametrize(("routing", "scale", "biased"), ROUTINGS, ids=str)
def test_experts(pool: Pool, routing: list[int], scale: float, biased: bool, count: int) -> None:
    bias = normal(8) * np.float32(0.3) if biased else None
    p, out, w = _experts_program(pool, count % 2, routing, scale, bias=bias)
    x = w["table"][run_tokens(p, count)].astype(np.float64)
    expected = _experts_twin(w, x, routing, scale, bias) + (x if count % 2 == 1 else 0)
    np.testing.assert_allclose(p.read(out, count), expected, rtol=2e-4, atol=2e-4)
    p.close()


@pytest.mark.parametrize("isa", ISAS, ids=lambda i: ISA_NAMES[i])
def test_result_does_not_depend_on_company_threads_or_nodes(isa: int) -> None:
    """A token alone, in company, and on other numbers of workers and nodes: the same bits."""
    results = []
    for threads, nodes in ((1, 0), (3, 0), (4, 2)):
        reseed(11)
        with Pool(threads, isa=isa, fake_nodes=nodes, pin=False) as pool:
            p, out, _ = _experts_program(pool, 1, [3, 0, 1, 0, 0, 0], 1.0)
            ids = run_tokens(p, 20)
            together = p.read(out, 20).copy()
            for i in (0, 7, 19):
                p.run(Step([(Row([0]), ids[i : i + 1])], sample_rows(0)))
                np.testing.assert_array_equal(p.read(out, 1)[0], together[i])
            results.append(together)
            p.close()
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_norm_input_may_be_overwritten_by_the_next_linear(one: Pool) -> None:
    """Buffers are shared: the linear after a norm may write where the norm's input lies."""
    table, w = normal(VOCAB, H), normal(H, H)
    p = Program(one, vocab=VOCAB)
    x = p.embed(table)
    n = p.model.add_buffer(H, False)
    ones = p.vector(np.ones(H, np.float32))
    p.model.add_op(structs.KT_OP_RMSNORM, inputs=[x], outputs=[n], weights=[ones])
    p.model.add_op(structs.KT_OP_LINEAR, inputs=[n], outputs=[x], weights=[p.weight(w)])
    p.finish(x, H)
    for _ in range(50):
        ids = run_tokens(p, 1)
        v = table[ids].astype(np.float64)
        v = v / np.sqrt((v * v).mean(-1, keepdims=True)) @ w.T
        np.testing.assert_allclose(p.read(x, 1), v, rtol=1e-3, atol=1e-4)
    p.close()


def test_look_ahead_tokens_come_from_the_previous_step(one: Pool) -> None:
    p = Program(one, vocab=VOCAB)
    table = normal(VOCAB, H)
    x = p.embed(table)
    p.finish(x, H)
    rows = sample_rows(2)
    rows["token_index"] = [0, 1]
    first = p.run(Step([(Row([0]), [3]), (Row([1]), [9])], rows))
    expected = first.tokens[[1, 0]]
    p.run(Step([(Row([2]), [-2]), (Row([3]), [-1])], rows))
    np.testing.assert_array_equal(p.read(x, 2), table[expected])
    with pytest.raises(NativeError, match=r"tokens\[0\] is -3"):
        p.run(Step([(Row([2]), [-3])], sample_rows(0)))
    p.close()


def test_stats_add_up(one: Pool) -> None:
    p, _, _ = _experts_program(one, 1, [2, 0, 1, 0, 0, 0], 1.0)
    before = p.model.stats()
    run_tokens(p, 30, samples=4)
    after = p.model.stats()
    assert after["steps"] == before["steps"] + 1
    parts = sum(after[f"{name}_ns"] for name in ("expert", "attention", "linear", "sample"))
    assert 0 < parts <= after["run_ns"]
    assert after["weight_bytes"] >= 4 * (8 * 48 * H * 3)
    assert after["num_ops"] == 4
    p.close()


# ---- refusals ----

Setup = Callable[[Program], None]


def _linear(p: Program, **change: Any) -> None:
    x, y = p.embed(normal(VOCAB, H)), p.model.add_buffer(change.pop("width", 24), False)
    op = {"inputs": [x], "outputs": [y], "weights": [p.weight(normal(24, H))], **change}
    p.model.add_op(structs.KT_OP_LINEAR, **op)


def _attention(p: Program, ints: list[int], *, width: int = 64) -> None:
    q, k, v = p.embed(normal(VOCAB, 64)), p.embed(normal(VOCAB, 32)), p.embed(normal(VOCAB, 32))
    freq = p.vector(normal(8))
    p.model.add_op(
        structs.KT_OP_ATTENTION,
        inputs=[q, k, v],
        outputs=[p.model.add_buffer(width, False)],
        weights=[-1, -1, freq],
        ints=ints,
        floats=[1e-6, 0.25],
    )


def _moe(p: Program, ints: list[int], shapes: dict[str, tuple[int, ...]] | None = None) -> None:
    sizes = {"router": (8, H), "gate": (8, 32, H), "up": (8, 32, H), "down": (8, H, 32)}
    sizes.update(shapes or {})
    x = p.embed(normal(VOCAB, H))
    weights = [p.weight(normal(*sizes[n])) for n in ("router", "gate", "up", "down")]
    p.model.add_op(
        structs.KT_OP_MOE,
        inputs=[x],
        outputs=[p.model.add_buffer(H, False)],
        weights=weights,
        ints=ints,
    )


BAD_OPS: list[tuple[str, Setup]] = [
    ("code 77 is unknown", lambda p: p.model.add_op(77, outputs=[p.model.add_buffer(4, False)])),
    ("in0 is buffer 9, the model has 2", lambda p: _linear(p, inputs=[9])),
    ("out0 is buffer -1", lambda p: _linear(p, outputs=[])),
    ("w0 is weight 5, the model has 2", lambda p: _linear(p, weights=[5])),
    ("out0 has width 25, expected 24", lambda p: _linear(p, width=25)),
    (
        "out0 must not be in0",
        lambda p: p.model.add_op(
            structs.KT_OP_LINEAR,
            inputs=[x := p.embed(normal(VOCAB, H))],
            outputs=[x],
            weights=[p.weight(normal(H, H))],
        ),
    ),
    ("was added as kind 2, expected 0", lambda p: _linear(p, weights=[0])),
    (
        "has 8 values, expected 24",
        lambda p: _linear(p, weights=[p.weight(normal(24, H)), p.vector(normal(8))]),
    ),
    ("i1 \\(query heads\\) is 0", lambda p: _attention(p, [0, 0, 2, 16, 16, 1])),
    ("not a multiple of 3 KV heads", lambda p: _attention(p, [0, 4, 3, 16, 16, 1])),
    ("in0 has width 64, expected 32", lambda p: _attention(p, [0, 2, 2, 16, 16, 1])),
    ("i4 \\(rotary dims\\) is 15", lambda p: _attention(p, [0, 4, 2, 16, 15, 1])),
    ("has 8 values, expected 6", lambda p: _attention(p, [0, 4, 2, 16, 12, 1])),
    ("i4 \\(rotary dims\\) is 18", lambda p: _attention(p, [0, 4, 2, 16, 18, 1])),
    ("out0 has width 60, expected 64", lambda p: _attention(p, [0, 4, 2, 16, 16, 1], width=60)),
    ("experts per token\\) is 9", lambda p: _moe(p, [9])),
    ("experts per token\\) is 0", lambda p: _moe(p, [0])),
    ("8 experts do not divide into 3 groups", lambda p: _moe(p, [2, 0, 0, 3, 1])),
    ("the groups kept have 2", lambda p: _moe(p, [3, 0, 0, 4, 1])),
    ("do not fit together", lambda p: _moe(p, [2], {"up": (8, 48, H)})),
    ("does not fit gate", lambda p: _moe(p, [2], {"router": (4, H)})),
    (
        "i0 \\(group\\) is 7",
        lambda p: p.model.add_op(
            structs.KT_OP_RMSNORM,
            inputs=[p.embed(normal(VOCAB, H))],
            outputs=[p.model.add_buffer(H, False)],
            weights=[p.vector(normal(7))],
            ints=[7],
        ),
    ),
    (
        "out0 must have S rows",
        lambda p: p.model.add_op(
            structs.KT_OP_GATHER,
            inputs=[p.embed(normal(VOCAB, H))],
            outputs=[p.model.add_buffer(H, False)],
        ),
    ),
    (
        "in1 has S rows, out0 has T",
        lambda p: p.model.add_op(
            structs.KT_OP_ADD,
            inputs=[p.embed(normal(VOCAB, H)), p.model.add_buffer(H, True)],
            outputs=[p.model.add_buffer(H, False)],
        ),
    ),
]


@pytest.mark.parametrize(("message", "setup"), BAD_OPS, ids=[m for m, _ in BAD_OPS])
def test_bad_operations_are_refused_by_name(one: Pool, message: str, setup: Setup) -> None:
    p = Program(one, vocab=VOCAB)
    with pytest.raises(NativeError, match=message) as error:
        setup(p)
    assert error.value.status == structs.KT_ERR_ARGUMENT
    assert str(error.value).startswith("op ")
    p.close()


def test_bad_tensors_are_refused(one: Pool) -> None:
    p = Program(one, vocab=VOCAB)
    short = Tensor(np.zeros(10, np.uint8), (4, 32), type=8)
    with pytest.raises(NativeError, match=r"Q8_0 tensor \[1, 4, 32\]: num_bytes is 10"):
        p.weight(short)
    with pytest.raises(NativeError, match="12345") as error:
        p.weight(Tensor(np.zeros(10, np.uint8), (4, 32), type=12345))
    assert error.value.status == structs.KT_ERR_UNSUPPORTED
    with pytest.raises(NativeError, match="kind is 3"):
        p.weight(normal(2, 2), 3)
    p.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("page_size", 24),
        ("page_size", 8),
        ("num_pages", 0),
        ("kv_type", 3),
        ("sample_vocab", VOCAB + 1),
        ("max_rows", 0),
        ("max_logit_rows", 0),
    ],
)
def test_bad_model_configuration_names_the_field(one: Pool, field: str, value: int) -> None:
    with pytest.raises(NativeError, match=f"kt_model_config.{field} is {value}"):
        Program(one, vocab=VOCAB, **{field: value})


def test_state_errors(one: Pool) -> None:
    p = Program(one, vocab=VOCAB)
    x = p.embed(normal(VOCAB, H))
    block = Block(Step([(Row([0]), [1])], sample_rows(0)))
    with pytest.raises(NativeError, match="not finished") as error:
        p.run_block(block, Result(0))
    assert error.value.status == structs.KT_ERR_STATE
    with pytest.raises(NativeError, match="expected S rows of vocab_size 40"):
        p.model.finish(x)
    p.finish(x, H)
    with pytest.raises(NativeError, match="already finished"):
        p.model.add_buffer(4, False)
    with pytest.raises(NativeError, match="outside its 64"):
        p.model.read(x, 60, 5)
    p.close()


DAMAGES: list[tuple[str, str, int, int]] = [
    (r"tokens\[1\] is 40", "tokens", 1, VOCAB),
    (r"positions\[0\] is 5", "positions", 0, 5),
    (r"token_row\[2\] is 1", "token_row", 2, 1),
    (r"kv_slot\[1\] is 999", "kv_slot", 1, 999),
    (r"row_start\[1\] is 4", "row_start", 1, 4),
    (r"row_start\[0\] is 1", "row_start", 0, 1),
    (r"context_len\[0\] is 17", "context_len", 0, 17),
    (r"context_len\[0\] is 2", "context_len", 0, 2),
    (r"num_prompt\[0\] is 4", "num_prompt", 0, 4),
    (r"num_prompt\[0\] is -1", "num_prompt", 0, -1),
    (r"page_ids\[0\] is 64", "page_ids", 0, 64),
    (r"page_ids\[0\] is -1", "page_ids", 0, -1),
    (r"page_start\[1\] is 2", "page_start", 1, 2),
]


@pytest.fixture
def small(one: Pool) -> Iterator[Program]:
    p = Program(one, vocab=VOCAB)
    p.finish(p.embed(normal(VOCAB, H)), H)
    yield p
    p.close()


@pytest.mark.parametrize(("message", "array", "index", "value"), DAMAGES)
def test_damaged_steps_are_refused(
    small: Program, message: str, array: str, index: int, value: int
) -> None:
    block = Block(Step([(Row([5]), [1, 2, 3])], sample_rows(1)))
    block.array(array, index + 1)[index] = value
    with pytest.raises(NativeError, match=message):
        small.run_block(block, Result(1))
    small.run_block(Block(Step([(Row([5]), [1, 2, 3])], sample_rows(1))), Result(1))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_tokens", 0, "num_tokens is 0"),
        ("num_tokens", 65, "num_tokens is 65"),
        ("num_rows", 9, "num_rows is 9"),
        ("num_samples", 65, "num_samples is 65"),
        ("num_page_ids", 10**6, "page_ids at offset"),
        ("num_bias", -1, "num_bias is -1"),
    ],
)
def test_bad_plans_are_refused(small: Program, field: str, value: int, message: str) -> None:
    block = Block(Step([(Row([5]), [1, 2, 3])], sample_rows(1)))
    setattr(block.plan, field, value)
    with pytest.raises(NativeError, match=message):
        small.run_block(block, Result(1))


def test_layout_outside_the_block_is_refused(small: Program) -> None:
    block = Block(Step([(Row([5]), [1, 2, 3])], sample_rows(1)))
    block.layout.tokens = block.layout.num_bytes
    with pytest.raises(NativeError, match="tokens at offset"):
        small.run_block(block, Result(1))
    block.layout.tokens = 2
    with pytest.raises(NativeError, match="tokens at offset 2"):
        small.run_block(block, Result(1))


def test_sample_rows_are_checked(small: Program) -> None:
    rows = sample_rows(1)
    rows["token_index"] = 3
    with pytest.raises(NativeError, match=r"token_index\[0\] is 3"):
        small.run_block(Block(Step([(Row([5]), [1, 2, 3])], rows)), Result(1))
    with pytest.raises(NativeError, match="has room for 0 rows"):
        small.run_block(Block(Step([(Row([5]), [1, 2, 3])], sample_rows(1))), Result(0))


def test_create_and_destroy_give_the_memory_back(one: Pool) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    sizes = []
    for _ in range(6):
        p, _, _ = _experts_program(one, 1, [2, 0, 1, 0, 0, 0], 1.0)
        run_tokens(p, 3, samples=1)
        p.close()
        sizes.append(resident())
    assert sizes[-1] - sizes[1] < 8 << 20
