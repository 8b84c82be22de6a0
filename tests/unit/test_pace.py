"""The lane's pace against a simulated GPU: the bus does not rest, decode steps stay short."""

from __future__ import annotations

import pytest

from kt_async.engine.pace import Pace


def simulate(step_s: float, layer_s: float, queue_s: float, steps: int = 60) -> tuple[float, float]:
    """Mean share of the lane's best rate, and of queueing in a decode step, when it has settled."""
    pace, left, done, queueing, elapsed = Pace(), 0.0, 0.0, 0.0, 0.0
    for number in range(steps):
        count = pace.layers(round(left))
        for _ in range(count):
            pace.observe_queueing(queue_s)
        left += count
        duration = step_s + count * queue_s
        finished = min(left, duration / layer_s)
        left -= finished
        pace.observe_step(step_s, round(left))
        if number >= steps // 2:
            done, elapsed, queueing = (
                done + finished,
                elapsed + duration,
                queueing + count * queue_s,
            )
    return done * layer_s / elapsed, queueing / (elapsed - queueing)


@pytest.mark.parametrize(
    ("step_s", "layer_s", "queue_s"),
    [(0.012, 0.007, 0.0008), (0.070, 0.007, 0.001), (0.015, 0.010, 0.0005), (0.012, 0.004, 0.0005)],
)
def test_the_lane_is_kept_busy(step_s: float, layer_s: float, queue_s: float) -> None:
    rate, share = simulate(step_s, layer_s, queue_s)
    assert rate > 0.85
    assert share <= 0.16


def test_slow_queueing_costs_the_lane_and_not_the_decode_rows() -> None:
    rate, share = simulate(step_s=0.012, layer_s=0.001, queue_s=0.001)
    assert 0.07 < rate < 0.3
    assert share <= 0.15


def test_short_steps_leave_room_up_to_a_length() -> None:
    rate, share = simulate(step_s=0.003, layer_s=0.0005, queue_s=0.0005)
    assert rate > 0.6
    assert 0.003 * (1 + share) <= 0.0121
    _, share = simulate(step_s=0.011, layer_s=0.0005, queue_s=0.0005)
    assert share <= 0.16


def test_a_slow_lane_holds_few_layers() -> None:
    pace = Pace()
    for _ in range(20):
        pace.observe_step(0.012, 5)
    assert pace.depth == 2
    assert pace.layers(2) == 0


def test_the_first_step_beside_it_gets_one_layer() -> None:
    pace = Pace()
    assert pace.layers(0) == 1
    pace.observe_queueing(0.001)
    assert pace.layers(0) == 1
    pace.observe_step(0.014, 0)
    assert pace.layers(0) == 2
