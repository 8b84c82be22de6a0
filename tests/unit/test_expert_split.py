"""The cost model that shares a prompt chunk's experts between GPU and CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kt_async.engine.expert_split import LayerRates, SplitRates

EXPERTS, TOP_K = 128, 8
# One H200 with 16 AMX cores, Qwen3-30B-A3B Q4_K_M, rounded.
LAYER = LayerRates(52e-6, (1, 8, 16, 64, 128), (23e-6, 34e-6, 57e-6, 170e-6, 310e-6))
RATES = SplitRates([LAYER], (1.2e-3, 0.2e-6), (0.4e-3, 0.3e-6), overlap=True)


def uniform(tokens: int) -> np.ndarray:
    pairs = tokens * TOP_K
    return np.full(EXPERTS, pairs // EXPERTS) + (np.arange(EXPERTS) < pairs % EXPERTS)


def finish(rates: SplitRates, tokens: int, counts: np.ndarray, streamed: np.ndarray) -> float:
    """When the slowest side is done, counted without the model's prefix sums."""
    layer = rates.layers[0]
    copies = streamed.sum() * layer.copy_s
    host = sum(float(layer.cpu_seconds(counts[[e]])[0]) for e in np.flatnonzero(~streamed))
    gpu = rates.window(tokens) + copies if streamed.any() else 0.0
    return max(gpu, host + rates.gap(tokens) if host else 0.0)


def test_few_rows_stay_on_the_cpu_and_many_go_to_the_gpu() -> None:
    slow_bus = replace(RATES, layers=[replace(LAYER, copy_s=5e-3)])
    assert not slow_bus.choose(0, 4, uniform(4), 0).any()
    fast_bus = replace(RATES, layers=[replace(LAYER, copy_s=1e-9)], gpu_s=(0.0, 0.0))
    assert fast_bus.choose(0, 2048, uniform(2048), 0).sum() >= EXPERTS - 1


def test_the_cpu_gets_the_experts_with_the_fewest_rows() -> None:
    counts = np.random.default_rng(1).permutation(EXPERTS)
    streamed = RATES.choose(0, 1016, counts, 0)
    assert 0 < streamed.sum() < EXPERTS
    assert counts[streamed].min() > counts[~streamed].max()


def test_experts_copied_ahead_stay_with_the_gpu() -> None:
    counts = uniform(512)
    counts[:10] = 1
    streamed = RATES.choose(0, 512, counts, 10)
    assert streamed[:10].all()
    assert not RATES.choose(0, 512, counts, 0)[:10].any()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 300), min_size=12, max_size=12), st.floats(1e-6, 1e-3))
def test_no_other_number_of_experts_is_faster(rows: list[int], copy_s: float) -> None:
    counts = np.array(rows)
    rates = replace(RATES, layers=[replace(LAYER, copy_s=copy_s)])
    tokens = 1 + int(counts.sum()) // TOP_K
    best = finish(rates, tokens, counts, rates.choose(0, tokens, counts, 0))
    order = np.argsort(-counts, kind="stable")
    for number in range(int((counts > 0).sum()) + 1):
        other = np.zeros(len(counts), np.bool_)
        other[order[:number]] = True
        assert best <= finish(rates, tokens, counts, other) * (1 + 1e-9)


def test_an_expert_without_rows_is_neither_copied_nor_computed() -> None:
    counts = uniform(2048)
    counts[::2] = 0
    streamed = RATES.choose(0, 1024, counts, 0)
    assert not streamed[::2].any()
    assert LAYER.cpu_seconds(counts)[::2].sum() == 0


def test_no_cliff_between_prompt_lengths() -> None:
    times = [
        finish(RATES, t, uniform(t), RATES.choose(0, t, uniform(t), 0)) for t in range(1, 4096)
    ]
    steps = np.diff(times)
    assert steps.min() > -1e-4  # a longer prompt is never much faster
    assert steps.max() < 2e-4


def test_without_overlap_each_expert_goes_where_it_is_cheaper() -> None:
    rates = replace(RATES, overlap=False, gpu_s=(0.0, 0.0), gap_s=(0.0, 0.0))
    counts = np.array([1, 8, 14, 15, 16, 64, 0, 300])
    cheaper = rates.layers[0].cpu_seconds(counts) > LAYER.copy_s
    np.testing.assert_array_equal(rates.choose(0, 100, counts, 0), cheaper)
    assert rates.ahead(0, 2048, TOP_K, EXPERTS) == 0


@pytest.mark.parametrize("tokens", [1, 16, 64, 512, 2048, 16384])
def test_copies_ahead_fit_into_the_time_the_bus_would_wait(tokens: int) -> None:
    ahead = RATES.ahead(0, tokens, TOP_K, EXPERTS)
    assert 0 <= ahead <= 0.75 * EXPERTS
    assert ahead * LAYER.copy_s <= RATES.window(tokens) + LAYER.copy_s
    if tokens >= 512:
        assert ahead > 0


def test_long_chunks_copy_everything_where_the_bus_would_wait() -> None:
    """Rates of an H200: the gap grows with the tokens, the copies of a whole layer do not."""
    rates = replace(RATES, gpu_s=(0.3e-3, 0.31e-6), gap_s=(0.3e-3, 0.62e-6), row_s=0.15e-6)
    everything = [t for t in (64, 512, 2048, 8192) if rates.streams_all(0, t, TOP_K, EXPERTS)]
    assert everything == [8192]
    slow_bus = replace(rates, layers=[replace(LAYER, copy_s=1e-3)])
    assert not slow_bus.streams_all(0, 8192, TOP_K, EXPERTS)
    assert not replace(rates, overlap=False).streams_all(0, 8192, TOP_K, EXPERTS)


def test_cost_goes_on_beyond_the_last_measured_row() -> None:
    seconds = LAYER.cpu_seconds(np.array([128, 192, 256]))
    assert seconds[0] == pytest.approx(310e-6)
    assert seconds[2] - seconds[1] == pytest.approx(seconds[1] - seconds[0])
