"""kt_sample against its numpy twin: exact argmax, distributions, penalties, log-probabilities."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from kt_async.errors import NativeError
from kt_async.ffi import structs
from kt_async.ffi.host import ISA_NAMES, query_host
from kt_async.ffi.lib import check, load
from kt_async.ffi.pool import Pool
from tests.native.program_steps import F32, Block, Result, Step, sample_rows
from tests.reference import sampling as twin

LARGE = 40_000  # three slices
ISAS = [ISA_NAMES.index(name) for name in query_host().isas if name != "avx512vnni"]


@pytest.fixture(params=ISAS, ids=lambda i: ISA_NAMES[i])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with Pool(3, isa=request.param, pin=False) as opened:
        yield opened


@pytest.fixture
def fast() -> Iterator[Pool]:
    with Pool(2, pin=False) as opened:
        yield opened


def run(
    pool: Pool,
    logits: F32,
    samples: npt.NDArray[np.void],
    *,
    bias: Sequence[tuple[int, float]] = (),
    history: Sequence[tuple[int, int]] = (),
    mask: npt.NDArray[np.uint32] | None = None,
    sample_vocab: int | None = None,
) -> Result:
    """All rows at once; checks that the logits stay as they were."""
    before = logits.copy()
    block = Block(Step([], samples, bias, history, mask))
    result = Result(len(samples), mask)
    vocab = logits.shape[1]
    status = load().kt_sample(
        pool.handle,
        logits.ctypes.data,
        vocab,
        sample_vocab or vocab,
        ctypes.byref(block.plan),
        ctypes.byref(block.layout),
        block.bytes.ctypes.data,
        ctypes.byref(result.struct),
    )
    check(status)
    np.testing.assert_array_equal(logits, before)
    return result


def draw_logits(rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> F32:
    return (spread * np.random.default_rng(seed).standard_normal((rows, vocab))).astype(np.float32)


def params_of(row: np.void) -> dict[str, float]:
    return {name: row[name].item() for name in row.dtype.names or ()}


def pack_mask(allowed: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    padded = np.zeros((allowed.shape[0], -(-allowed.shape[1] // 32) * 32), bool)
    padded[:, : allowed.shape[1]] = allowed
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint32)


def test_philox_known_answers() -> None:
    """From the Random123 distribution's kat_vectors (philox4x32, 10 rounds)."""
    assert twin.philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("vocab", [1, 5, 1000, LARGE])
def test_greedy_is_exact_argmax(pool: Pool, vocab: int) -> None:
    logits = draw_logits(6, vocab)
    result = run(pool, logits, sample_rows(6))
    np.testing.assert_array_equal(result.tokens, logits.argmax(axis=1))


def test_greedy_ties_take_the_lowest_id(pool: Pool) -> None:
    logits = np.zeros((3, LARGE), np.float32)
    logits[0, [39_999, 20_000, 16_384]] = 2
    logits[1, [30_000, 77]] = 1
    result = run(pool, logits, sample_rows(3))
    assert result.tokens.tolist() == [16_384, 77, 0]


def test_nan_never_wins(pool: Pool) -> None:
    logits = draw_logits(2, 1000)
    best = logits[:, 1:].argmax(axis=1) + 1
    logits[:, 0] = np.nan
    assert run(pool, logits, sample_rows(2)).tokens.tolist() == best.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_beyond_sample_vocab_are_never_sampled(fast: Pool, temperature: float) -> None:
    logits = draw_logits(8, 1000)
    logits[:, 900:] += 50
    rows = sample_rows(8)
    rows["temperature"] = temperature
    rows["position"] = np.arange(8)
    assert (run(fast, logits, rows, sample_vocab=900).tokens < 900).all()


CASES = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_k": 5},
    {"top_k": 1},
    {"top_k": 40, "top_p": 0.7},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.02},
    {"top_k": 10**6},
]


@pytest.mark.parametrize("vocab", [50, 2000, LARGE])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_match_the_twin(fast: Pool, case: dict[str, float], vocab: int) -> None:
    count = 12
    logits = draw_logits(count, vocab, spread=2.5)
    rows = sample_rows(count)
    rows["temperature"] = 1
    for name, value in case.items():
        rows[name] = value
    rows["seed"] = 2**40 + np.arange(count)
    rows["position"] = np.arange(count) * 7
    result = run(fast, logits, rows)
    for i in range(count):
        params = params_of(rows[i])
        processed = twin.process(logits[i], params)
        cumulative = np.cumsum(twin.distribution(processed, params))
        u = twin.uniform(params["seed"], params["position"])
        # f32 weights move the boundaries a little: any id within that distance of u is right.
        low = np.searchsorted(cumulative, u - 1e-5, side="right")
        high = np.searchsorted(cumulative, u + 1e-5, side="right")
        assert low <= result.tokens[i] <= max(high, low)


def test_draws_match_the_twin_on_every_isa(pool: Pool) -> None:
    logits = draw_logits(16, 3000)
    rows = sample_rows(16)
    rows["temperature"], rows["top_p"], rows["seed"] = 0.8, 0.9, np.arange(16)
    result = run(pool, logits, rows)
    for i in range(16):
        processed = twin.process(logits[i], params_of(rows[i]))
        assert result.tokens[i] == twin.sample(processed, params_of(rows[i]), i, 0)


def test_frequencies_follow_the_distribution(fast: Pool) -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    count = 4000
    logits = np.tile(np.log(probabilities).astype(np.float32), (count, 1))
    rows = sample_rows(count)
    rows["temperature"] = 1
    rows["position"] = np.arange(count)
    shares = np.bincount(run(fast, logits, rows).tokens, minlength=5) / count
    # Four standard deviations of a binomial share.
    assert (np.abs(shares - probabilities) < 4 * np.sqrt(probabilities / count)).all()


def test_draw_does_not_depend_on_slot_or_company(fast: Pool) -> None:
    logits = draw_logits(9, 5000)
    rows = sample_rows(9)
    rows["temperature"], rows["seed"], rows["position"] = 1, np.arange(9) + 5, 3
    together = run(fast, logits, rows).tokens
    order = np.random.default_rng(0).permutation(9)
    shuffled = run(fast, np.ascontiguousarray(logits[order]), rows[order]).tokens
    np.testing.assert_array_equal(shuffled, together[order])
    for i in range(9):
        alone = run(fast, np.ascontiguousarray(logits[i : i + 1]), rows[i : i + 1])
        assert alone.tokens[0] == together[i]


def test_penalties_and_bias_match_the_twin(pool: Pool) -> None:
    logits = draw_logits(3, 200)
    history = [(int(i), c) for i, c in zip([3, 9, 50, 120, 7], [0, 1, 2, 5, 3], strict=True)]
    bias = [(11, 4.0), (12, -100.0), (3, 1.5)]
    rows = sample_rows(3)
    rows["repetition_penalty"] = [1.3, 1.0, 0.8]
    rows["presence_penalty"] = [0.0, 0.5, -0.7]
    rows["frequency_penalty"] = [0.2, 0.0, 0.4]
    rows["history_count"], rows["bias_count"] = 5, 3
    rows["num_logprobs"] = 0
    # Penalised tokens lead, so that a wrong sign changes the winner.
    logits[:, [9, 120]] = [[7.0, 6.9]] * 3
    result = run(pool, logits, rows, history=history, bias=bias)
    for i in range(3):
        processed = twin.process(logits[i], params_of(rows[i]), history=history, bias=bias)
        assert result.tokens[i] == processed.argmax()
        raw = twin.log_softmax(logits[i])[result.tokens[i]]
        assert result.logprobs[i] == pytest.approx(raw, abs=2e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mask_allows_only_its_tokens(fast: Pool, temperature: float) -> None:
    vocab = 1001
    logits = draw_logits(4, vocab)
    allowed = np.random.default_rng(4).random((2, vocab)) < 0.01
    rows = sample_rows(4)
    rows["temperature"] = temperature
    rows["position"] = np.arange(4)
    rows["mask_row"] = [1, -1, 0, 1]
    result = run(fast, logits, rows, mask=pack_mask(allowed))
    for i, row in enumerate([1, -1, 0, 1]):
        if row >= 0:
            assert allowed[row, result.tokens[i]]
    if temperature == 0:
        assert result.tokens[1] == logits[1].argmax()
        assert result.tokens[2] == np.where(allowed[0], logits[2], -np.inf).argmax()


def test_empty_mask_is_refused(fast: Pool) -> None:
    rows = sample_rows(1)
    rows["mask_row"] = 0
    mask = pack_mask(np.zeros((1, 100), bool))
    with pytest.raises(NativeError, match="mask row 0 allows no token"):
        run(fast, draw_logits(1, 100), rows, mask=mask)
    with pytest.raises(NativeError, match=r"kt_sample_out\.mask is NULL"):
        run(fast, draw_logits(1, 100), rows)


@pytest.mark.parametrize("vocab", [7, 300, LARGE])
def test_logprobs_and_alternatives(pool: Pool, vocab: int) -> None:
    logits = draw_logits(3, vocab)
    logits[1, vocab // 2 :] = logits[1, 0]  # many ties
    rows = sample_rows(3)
    rows["num_logprobs"] = [0, 20, 5]
    rows["target"] = [-1, -1, vocab - 1]
    result = run(pool, logits, rows)
    assert result.tokens[2] == vocab - 1
    for i, count in enumerate([0, 20, 5]):
        exact = twin.log_softmax(logits[i])
        assert result.logprobs[i] == pytest.approx(exact[result.tokens[i]], abs=3e-6)
        order = np.lexsort((np.arange(vocab), -logits[i]))[:count]
        np.testing.assert_array_equal(result.top_ids[i, : len(order)], order)
        np.testing.assert_allclose(result.top_logprobs[i, : len(order)], exact[order], atol=3e-6)
    assert np.isnan(result.top_logprobs[0]).all()


def test_extreme_logits(pool: Pool) -> None:
    logits = np.full((3, 100), -1e30, np.float32)
    logits[0, 5] = 1e30
    logits[1, 6] = -1e29
    logits[2] = -np.inf
    logits[2, 9] = 0
    rows = sample_rows(3)
    rows["temperature"] = [1, 1e-6, 1]
    rows["num_logprobs"] = 0
    result = run(pool, logits, rows)
    assert result.tokens.tolist() == [5, 6, 9]
    np.testing.assert_allclose(result.logprobs, [0, 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1, "temperature"),
        ("temperature", np.nan, "temperature"),
        ("top_p", 1.5, "top_p"),
        ("min_p", -0.1, "min_p"),
        ("top_k", -1, "top_k"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("num_logprobs", 21, "num_logprobs"),
        ("target", 100, "target"),
        ("bias_count", 1, "bias_count"),
        ("history_start", -1, "history_count"),
        ("history_count", 3, "history_count"),
    ],
)
def test_bad_parameters_name_the_field(fast: Pool, field: str, value: float, message: str) -> None:
    rows = sample_rows(2)
    rows[1][field] = value
    with pytest.raises(NativeError, match=message) as error:
        run(fast, draw_logits(2, 100), rows)
    assert error.value.status == structs.KT_ERR_ARGUMENT


def test_bad_ids_are_refused(fast: Pool) -> None:
    rows = sample_rows(1)
    rows["bias_count"] = 1
    with pytest.raises(NativeError, match=r"bias_ids\[0\] is 100"):
        run(fast, draw_logits(1, 100), rows, bias=[(100, 1.0)])
    rows = sample_rows(1)
    rows["history_count"] = 1
    with pytest.raises(NativeError, match=r"history_ids\[0\] is -1"):
        run(fast, draw_logits(1, 100), rows, history=[(-1, 1)])
