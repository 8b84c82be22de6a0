"""Prompt tokens beside generated ones: each kind has its own bits, whatever the company is.

On CPUs with AMX prompt tokens are multiplied in bf16 tiles, elsewhere like all others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as T

from kt_async.ffi import structs
from kt_async.ffi.experts import experts_multiply
from kt_async.ffi.handoff import ExpertSet
from kt_async.ffi.host import isa_number, query_host
from kt_async.ffi.matrix import Matrix
from kt_async.ffi.pool import Pool

from . import tolerances
from .program_steps import Program, Row, Step, Tensor, sample_rows
from .quant_data import ALL_TYPES, FLOATS, block_size, random_tensor, reference

F32 = npt.NDArray[np.float32]
ISAS = query_host().isas
VOCAB, H, EXPERTS, TOP_K = 32, 256, 6, 2


@pytest.fixture(scope="module", params=ISAS)
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with Pool(3, isa=isa_number(request.param), pin=False) as made:
        yield made


def has_tiles(pool: Pool) -> bool:
    return "amx" in pool.describe()


@pytest.mark.parametrize("kind", ALL_TYPES, ids=lambda kind: kind.name)
def test_product_of_prompt_rows(kind: T, pool: Pool) -> None:
    """Against f64 products, for numbers of rows around the sizes of tiles and passes."""
    cols = {1: 295, 32: 288, 256: 512}[block_size(kind)]
    data = random_tensor(kind, 75, cols)
    weights = reference(kind, data, cols).astype(np.float64)
    x = np.random.default_rng(2).standard_normal((300, cols), np.float32)
    with Matrix(pool, int(kind), data, 75, cols) as packed:
        whole = packed.multiply(x, is_prompt=True)
        exact = x.astype(np.float64) @ weights.T
        error = np.linalg.norm(whole - exact) / np.linalg.norm(exact)
        if not has_tiles(pool) or kind in FLOATS:
            np.testing.assert_array_equal(whole, packed.multiply(x))
        else:
            assert error < tolerances.PROMPT_PRODUCT
        for count in (1, 2, 16, 17, 32, 33, 48, 49, 97, 257):
            got = packed.multiply(x[-count:], is_prompt=True)
            np.testing.assert_array_equal(got, whole[-count:])


@pytest.mark.parametrize("threads", [1, 3, 9])
@pytest.mark.parametrize("isa", ISAS[-1:])
def test_many_experts_are_shared_by_teams(isa: str, threads: int) -> None:
    """Workers take experts as they come; a token has the bits that it has alone, time and again."""
    hidden, inner, experts, top_k, tokens = 640, 256, 40, 4, 150
    rng = np.random.default_rng(7)
    x = rng.standard_normal((tokens, hidden), np.float32)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    ids[ids % 2 == 1] %= 3  # few experts with many rows, of which one token may take one twice
    ids[:, -1] = rng.integers(0, experts, tokens)
    factors = rng.random((tokens, top_k), np.float32)
    is_prompt = (rng.random(tokens) < 0.8).astype(np.uint8)
    shapes = [(T.Q4_0, inner, hidden), (T.Q4_0, inner, hidden), (T.Q6_K, hidden, inner)]
    with Pool(threads, isa=isa_number(isa), pin=False) as pool, contextlib.ExitStack() as stack:
        matrices = tuple(
            stack.enter_context(
                Matrix(pool, int(kind), random_tensor(kind, experts * r, c, seed=i), r, c, experts)
            )
            for i, (kind, r, c) in enumerate(shapes)
        )
        whole = experts_multiply(matrices, x, ids, factors, is_prompt=is_prompt)
        again = experts_multiply(matrices, x, ids, factors, is_prompt=is_prompt)
        np.testing.assert_array_equal(again, whole)
        for t in range(0, tokens, 13):
            row = slice(t, t + 1)
            alone = experts_multiply(
                matrices, x[row], ids[row], factors[row], is_prompt=is_prompt[row]
            )
            np.testing.assert_array_equal(alone[0], whole[t])


@pytest.mark.parametrize(
    ("up_kind", "down_kind"), [(T.Q4_K, T.Q6_K), (T.Q8_0, T.BF16), (T.BF16, T.Q4_K), (T.F16, T.F32)]
)
def test_expert_layer_with_both_kinds_of_tokens(up_kind: T, down_kind: T, pool: Pool) -> None:
    """A token's bits in a mixed layer are those it has alone; the set gives the same as the call."""
    inner = 256
    rng = np.random.default_rng(5)
    shapes = {"gate": (inner, H), "up": (inner, H), "down": (H, inner)}
    kinds = {"gate": up_kind, "up": up_kind, "down": down_kind}
    data = {n: random_tensor(kinds[n], EXPERTS * r, c, seed=3) for n, (r, c) in shapes.items()}
    x = rng.standard_normal((90, H), np.float32)
    ids = np.argsort(rng.random((90, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
    factors = rng.random((90, TOP_K), np.float32)
    is_prompt = (rng.random(90) < 0.7).astype(np.uint8)
    matrices = tuple(
        Matrix(pool, int(kinds[n]), data[n], r, c, EXPERTS) for n, (r, c) in shapes.items()
    )
    mixed = experts_multiply(matrices, x, ids, factors, is_prompt=is_prompt)
    generated = experts_multiply(matrices, x, ids, factors)
    prompt = experts_multiply(matrices, x, ids, factors, is_prompt=np.ones(90, np.uint8))
    expected = np.where(is_prompt[:, None] != 0, prompt, generated)
    np.testing.assert_array_equal(mixed, expected)
    for t in (0, 1, 50, 89):
        row = slice(t, t + 1)
        alone = experts_multiply(matrices, x[row], ids[row], factors[row], is_prompt=is_prompt[row])
        np.testing.assert_array_equal(alone[0], mixed[t])
    difference = np.linalg.norm(prompt - generated) / np.linalg.norm(generated)
    rounds = has_tiles(pool) and not {up_kind, down_kind} <= set(FLOATS)
    assert 0 < difference < 3 * tolerances.INT8_PRODUCT if rounds else difference == 0
    experts = ExpertSet(pool, 90, TOP_K)
    tensors = [
        structs.tensor_at(int(kinds[n]), (EXPERTS, r, c), data[n].nbytes, data[n].ctypes.data)
        for n, (r, c) in shapes.items()
    ]
    experts.add_layer(*tensors)
    experts.finish()
    out = np.empty_like(x)
    experts.run(0, x, ids, factors, out, is_prompt)
    np.testing.assert_array_equal(out, mixed)
    experts.close()
    for matrix in matrices:
        matrix.close()


def q4_tensor(rows: int, experts: int = 1) -> Tensor:
    data = random_tensor(T.Q4_K, experts * rows, H, seed=rows)
    shape = (rows, H) if experts == 1 else (experts, rows, H)
    return Tensor(data, shape, int(T.Q4_K))


def test_program_with_both_kinds_of_tokens(pool: Pool) -> None:
    """Linear (with a cut pair of bands, bias and residual), norm and experts in one program."""
    rng = np.random.default_rng(9)
    p = Program(pool, vocab=VOCAB)
    x = p.embed(rng.standard_normal((VOCAB, H)).astype(np.float32))
    norm, wide, narrow, out = (p.model.add_buffer(n, False) for n in (H, 264, H, H))
    ones = p.vector(np.ones(H, np.float32))
    bias = p.vector(rng.standard_normal(264).astype(np.float32))
    p.model.add_op(structs.KT_OP_RMSNORM, inputs=[x], outputs=[norm], weights=[ones], floats=[1e-6])
    p.model.add_op(
        structs.KT_OP_LINEAR,
        inputs=[norm, -1],
        outputs=[wide],
        weights=[p.weight(q4_tensor(264)), bias],
    )
    p.model.add_op(
        structs.KT_OP_LINEAR, inputs=[norm, x], outputs=[narrow], weights=[p.weight(q4_tensor(H))]
    )
    router = rng.standard_normal((EXPERTS, H)).astype(np.float32)
    experts = [p.weight(q4_tensor(H, EXPERTS)) for _ in range(3)]
    p.model.add_op(
        structs.KT_OP_MOE,
        inputs=[narrow, narrow],
        outputs=[out],
        weights=[p.weight(router, structs.KT_WEIGHT_VECTOR), *experts, -1],
        ints=[TOP_K, 0, 1, 0, 0, 0],
        floats=[1.0],
    )
    p.finish(out, H, rng.standard_normal((VOCAB, H)).astype(np.float32))
    # Generated, prompt, both, one prompt token; then each token alone.
    rows = [([3, 4, 5], 0), (list(range(20)), 20), (list(range(9)), 4), ([7], 1)]
    ids = [token for row, _ in rows for token in row]
    kinds = [i < prompt for row, prompt in rows for i in range(len(row))]
    step = [(Row([3 * i, 3 * i + 1]), row) for i, (row, _) in enumerate(rows)]
    p.run(Step(step, sample_rows(0), num_prompt=[prompt for _, prompt in rows]))
    together = [p.read(buffer, len(ids)).copy() for buffer in (wide, narrow, out)]
    bits = {}
    for at, (token, is_prompt) in enumerate(zip(ids, kinds, strict=True)):
        p.run(Step([(Row([0]), [token])], sample_rows(0), num_prompt=[int(is_prompt)]))
        for buffer, expected in zip((wide, narrow, out), together, strict=True):
            np.testing.assert_array_equal(p.read(buffer, 1)[0], expected[at])
        bits[token, is_prompt] = p.read(out, 1)[0]
    both = [np.array_equal(bits[t, True], bits[t, False]) for t in range(4, 9)]
    assert all(both) != has_tiles(pool)
    p.close()


def test_linears_of_more_rows_than_a_block(pool: Pool) -> None:
    """Two linears of one group over runs of 1, 2 and 3 blocks of 256 rows: each token as alone."""
    rng = np.random.default_rng(11)
    p = Program(pool, vocab=VOCAB, max_tokens=1024, num_pages=128)
    x = p.embed(rng.standard_normal((VOCAB, H)).astype(np.float32))
    wide, narrow = (p.model.add_buffer(n, False) for n in (264, H))
    for out, width in ((wide, 264), (narrow, H)):
        weights = [p.weight(q4_tensor(width))]
        p.model.add_op(structs.KT_OP_LINEAR, inputs=[x, -1], outputs=[out], weights=weights)
    p.finish(narrow, H, rng.standard_normal((VOCAB, H)).astype(np.float32))
    lengths, prompts = [300, 600, 3], [300, 20, 3]  # the second one: 20 and 580
    ids = rng.integers(0, VOCAB, sum(lengths)).tolist()
    ends = np.cumsum(lengths).tolist()
    rows = [ids[end - n : end] for end, n in zip(ends, lengths, strict=True)]
    step = [(Row(list(range(40 * i, 40 * i + 40))), row) for i, row in enumerate(rows)]
    p.run(Step(step, sample_rows(0), num_prompt=prompts))
    together = [p.read(buffer, len(ids)).copy() for buffer in (wide, narrow)]
    kinds = [i < n for row, n in zip(rows, prompts, strict=True) for i in range(len(row))]
    alone: dict[tuple[int, bool], list[F32]] = {}
    for at, (token, is_prompt) in enumerate(zip(ids, kinds, strict=True)):
        if (token, is_prompt) not in alone:
            p.run(Step([(Row([127]), [token])], sample_rows(0), num_prompt=[int(is_prompt)]))
            alone[token, is_prompt] = [p.read(buffer, 1)[0].copy() for buffer in (wide, narrow)]
        for got, expected in zip(together, alone[token, is_prompt], strict=True):
            np.testing.assert_array_equal(got[at], expected)
    p.close()
