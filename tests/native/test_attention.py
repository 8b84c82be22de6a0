"""KT_OP_ATTENTION against the numpy twin, and its promise about the order of additions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from kt_async.ffi import structs
from kt_async.ffi.host import ISA_NAMES, query_host
from kt_async.ffi.pool import Pool
from tests.native.program_steps import F32, Program, Row, Step, sample_rows
from tests.reference.attention import attention, rms_norm, rope

VOCAB = 1200  # one token id per position, so that every position has its own q, k and v
ISAS = [ISA_NAMES.index(name) for name in query_host().isas if name != "avx512vnni"]
# Largest error against float64: f32 sums, then the rounding of stored keys and values (values
# are below 4, softmax averages them).
TOLERANCE = {structs.KT_KV_F32: 2e-5, structs.KT_KV_F16: 4e-3, structs.KT_KV_BF16: 3e-2}


@dataclass
class Case:
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    rotary: int = 16
    neox: bool = True
    norm: bool = True
    kv_type: int = structs.KT_KV_F32
    page_size: int = 16
    threads: int = 2
    isa: int = structs.KT_ISA_AUTO
    fake_nodes: int = 0
    multiplier: float = 1.0
    tables: dict[str, F32] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(3)
        for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            self.tables[name] = rng.standard_normal((VOCAB, heads * self.dim), np.float32)
        self.tables["qn"] = (1 + 0.2 * rng.standard_normal(self.dim)).astype(np.float32)
        self.tables["kn"] = (1 + 0.2 * rng.standard_normal(self.dim)).astype(np.float32)
        powers = np.arange(self.rotary // 2) / max(self.rotary // 2, 1)
        self.tables["freq"] = (1 / 10000.0**powers).astype(np.float32)

    def expected(self, ids: Sequence[int]) -> F32:
        """The whole sequence's output [len(ids), heads * dim]."""
        q, k, v = (
            self.tables[name][list(ids)].reshape(len(ids), -1, self.dim).astype(np.float64)
            for name in "qkv"
        )
        if self.norm:
            q, k = rms_norm(q, self.tables["qn"], 1e-6), rms_norm(k, self.tables["kn"], 1e-6)
        positions = np.arange(len(ids))
        if self.rotary:
            freq = self.tables["freq"].astype(np.float64)
            q, k = (rope(x, positions, freq, self.neox, self.multiplier) for x in (q, k))
        out = attention(q, k, v, self.dim**-0.5)
        return out.reshape(len(ids), -1).astype(np.float32)


class Runner:
    """One attention layer fed from tables."""

    def __init__(self, case: Case) -> None:
        self.pool = Pool(case.threads, isa=case.isa, fake_nodes=case.fake_nodes, pin=False)
        self.program = program = Program(
            self.pool,
            vocab=VOCAB,
            page_size=case.page_size,
            max_tokens=VOCAB,
            num_pages=4 * VOCAB // case.page_size,
            kv_type=case.kv_type,
        )
        width = case.heads * case.dim
        inputs = [program.embed(case.tables[name]) for name in "qkv"]
        self.out = program.model.add_buffer(width, False)
        norms = [program.vector(case.tables[n]) if case.norm else -1 for n in ("qn", "kn")]
        freq = program.vector(case.tables["freq"]) if case.rotary else -1
        program.model.add_op(
            structs.KT_OP_ATTENTION,
            inputs=inputs,
            outputs=[self.out],
            weights=[*norms, freq],
            ints=[0, case.heads, case.kv_heads, case.dim, case.rotary, int(case.neox)],
            floats=[1e-6, case.dim**-0.5, case.multiplier],
        )
        program.finish(self.out, width)

    def run(self, rows: Sequence[tuple[Row, Sequence[int]]]) -> F32:
        self.program.run(Step(rows, sample_rows(0)))
        return self.program.read(self.out, sum(len(ids) for _, ids in rows))

    def sequence(self, length: int, first_page: int = 0, *, seed: int = 0) -> Row:
        """Pages in shuffled order, so that physical neighbours are not logical ones."""
        pages = np.arange(-(-length // self.program.page_size)) + first_page
        np.random.default_rng(seed).shuffle(pages)
        return Row(pages.tolist())

    def close(self) -> None:
        self.program.close()
        self.pool.close()


@pytest.fixture
def runners() -> Iterator[list[Runner]]:
    opened: list[Runner] = []
    yield opened
    for runner in opened:
        runner.close()


def check(case: Case, runners: list[Runner], length: int) -> None:
    runner = Runner(case)
    runners.append(runner)
    ids = list(range(length))
    out = runner.run([(runner.sequence(length), ids)])
    assert np.abs(out - case.expected(ids)).max() <= TOLERANCE[case.kv_type]


@pytest.mark.parametrize("isa", ISAS, ids=lambda i: ISA_NAMES[i])
@pytest.mark.parametrize("kv_type", TOLERANCE, ids=["f32", "f16", "bf16"])
def test_matches_the_twin(isa: int, kv_type: int, runners: list[Runner]) -> None:
    check(Case(isa=isa, kv_type=kv_type), runners, 150)


@pytest.mark.parametrize(
    "case",
    [
        Case(dim=40, rotary=40),
        Case(dim=128, rotary=128, heads=8, kv_heads=1),
        Case(heads=6, kv_heads=2, dim=32, rotary=32),
        Case(heads=3, kv_heads=3, dim=24, rotary=24, norm=False),
        Case(rotary=8),
        Case(rotary=0),
        Case(neox=False),
        Case(neox=False, rotary=10),
        Case(multiplier=1.3),
        Case(page_size=64, fake_nodes=2),
        Case(threads=1),
        Case(threads=5),
    ],
    ids=lambda case: (
        f"h{case.heads}-kv{case.kv_heads}-d{case.dim}-r{case.rotary}-neox{case.neox:d}"
        f"-p{case.page_size}-t{case.threads}-m{case.multiplier}"
    ),
)
@pytest.mark.parametrize("length", [1, 17, 70])
def test_shapes(case: Case, length: int, runners: list[Runner]) -> None:
    check(case, runners, length)


@pytest.mark.parametrize("isa", ISAS, ids=lambda i: ISA_NAMES[i])
def test_chunking_and_company_change_no_bit(isa: int, runners: list[Runner]) -> None:
    """Whole prompt, chunks of odd sizes, single tokens and a batch of three: the same bits."""
    case = Case(isa=isa, heads=4, kv_heads=1, dim=32, rotary=32, kv_type=structs.KT_KV_F16)
    runner = Runner(case)
    runners.append(runner)
    ids = list(np.random.default_rng(1).permutation(VOCAB)[:330])
    whole = runner.run([(runner.sequence(330), ids)])
    for sizes in ([1] * 20 + [310], [64, 64, 64, 138], [7, 250, 1, 1, 1, 70], [329, 1]):
        sequence, parts, at = runner.sequence(330, 30, seed=2), [], 0
        for size in sizes:
            parts.append(runner.run([(sequence, ids[at : at + size])]))
            at += size
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    others = [runner.sequence(50, 60), runner.sequence(200, 70)]
    mixed = runner.run(
        [(others[0], ids[:9]), (runner.sequence(330, 90), ids), (others[1], ids[5:160])]
    )
    np.testing.assert_array_equal(mixed[9:339], whole)


def test_long_contexts_split_over_workers_change_no_bit(runners: list[Runner]) -> None:
    """Decode rows of one to five segments, alone and together, on one and on five workers."""
    lengths = [1100, 300, 256, 257, 40]
    results = []
    for threads in (1, 5):
        case = Case(threads=threads, heads=4, kv_heads=1, dim=16)
        runner = Runner(case)
        runners.append(runner)
        sequences, page = [], 0
        for length in lengths:
            sequences.append(runner.sequence(length, page))
            page += -(-length // 16)
        ids = list(range(VOCAB))
        for sequence, length in zip(sequences, lengths, strict=True):
            runner.run([(sequence, ids[: length - 1])])
        alone = []
        for sequence, length in zip(sequences, lengths, strict=True):
            alone.append(runner.run([(sequence, ids[length - 1 : length])])[0])
            sequence.length -= 1
        together = runner.run(
            [
                (sequence, ids[length - 1 : length])
                for sequence, length in zip(sequences, lengths, strict=True)
            ]
        )
        np.testing.assert_array_equal(np.array(alone), together)
        results.append(together)
        assert np.abs(together[0] - case.expected(ids[:1100])[-1]).max() < 2e-5
    np.testing.assert_array_equal(results[0], results[1])


def test_stale_pages_do_not_leak(runners: list[Runner]) -> None:
    """A page used before, with infinities in it, gives a new sequence the same bits."""
    case = Case(norm=False)
    case.tables["v"][VOCAB - 16 :] = np.inf
    runner = Runner(case)
    runners.append(runner)
    ids = list(range(5))
    clean = runner.run([(Row([7]), ids)])
    runner.run([(Row([9]), list(range(VOCAB - 16, VOCAB)))])
    np.testing.assert_array_equal(runner.run([(Row([9]), ids)]), clean)
