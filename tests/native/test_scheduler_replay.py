"""A journal replays to the same schedule, and the comparison notices when it does not."""

from __future__ import annotations

import random

import pytest

from bench import sched_compare, sched_replay
from bench.errors import BenchError
from kt_async.ffi import structs
from tests.native.sched_sim import Sim

FLAGS = structs.KT_SCHED_JOURNAL | structs.KT_SCHED_PREFIX_CACHE | structs.KT_SCHED_LOOKAHEAD


def record(seed: int) -> str:
    rng = random.Random(seed)
    sim = Sim(flags=FLAGS, num_pages=30, max_len=100, num_host_pages=10, target_itl_ns=9000)
    stem = rng.choices(range(50), k=60)
    for i in range(25):
        sim.submit(
            stem[: rng.randint(0, 60)] + rng.choices(range(50), k=5),
            rng.randint(0, 30),
            stop_ids=rng.sample(range(50), 1),
            priority=rng.randint(-1, 1),
            prompt_logprobs=rng.choice([-1, 0]),
            presence_penalty=rng.choice([0.0, 1.0]),
            seed=2**64 - 1 - i,
        )
        sim.step_ns = rng.randint(10, 2000)
        sim.step()
        if i % 6 == 5:
            sim.scheduler.cancel(i - 2)
    sim.finish_all()
    assert sim.scheduler.stats()["preempted"] > 0
    return sched_replay.write_header(sim.config) + sim.scheduler.journal().decode()


@pytest.mark.parametrize("seed", range(3))
def test_replay_gives_every_plan_again(seed):
    text = record(seed)
    calls, difference = sched_replay.replay(text)
    assert difference is None
    assert calls["submit"] == 25
    assert calls["plan"] > 50
    assert calls["cancel"] > 1


def test_a_changed_schedule_is_noticed():
    lines = record(0).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("plan") and i > 40)
    digest = lines[at].split()[3]
    changed = lines.copy()
    changed[at] = lines[at].replace(digest, "0123456789abcdef")
    assert "0123456789abcdef" in (sched_replay.replay("\n".join(changed))[1] or "")
    # Another prompt token than the recorded one is fed by a later plan.
    submit = next(i for i, line in enumerate(lines) if line.startswith("submit"))
    words = lines[submit].split()
    words[-1] = str((int(words[-1]) + 1) % 50)
    changed = [*lines[:submit], " ".join(words), *lines[submit + 1 :]]
    assert "plan" in (sched_replay.replay("\n".join(changed))[1] or "")


def test_command_line(tmp_path, capsys):
    path = tmp_path / "journal.txt"
    path.write_text(record(1), encoding="ascii")
    assert sched_replay.main(path) == 0
    assert "bit by bit" in capsys.readouterr().out
    path.write_text("not a journal\n", encoding="ascii")
    assert sched_replay.main(path) == 2
    with pytest.raises(BenchError, match="first line"):
        sched_replay.replay("{]\n")


def test_pages_on_demand_beat_reserving_them_on_the_same_trace(tmp_path):
    figures, traces = sched_compare.compare(sched_compare.Limits(max_batch_size=16))
    reserve, demand = figures["reserve"], figures["on demand, no cache"]
    assert demand["tokens/s"] >= reserve["tokens/s"]
    assert demand["ttft p50"] < reserve["ttft p50"]
    assert figures["on demand"]["ttft p99"] < demand["ttft p99"]
    assert figures["on demand, itl 0.5 s"]["itl p99"] < 0.55 < figures["on demand"]["itl p99"]
    sched_compare.plot(traces, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_recorded_trace_replays(tmp_path, capsys):
    path = tmp_path / "journal.txt"
    assert sched_compare.record(path) == 0
    assert sched_replay.main(path) == 0
    assert "bit by bit" in capsys.readouterr().out
