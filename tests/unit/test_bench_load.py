"""The load generator and the benchmark programs against a fake server on loopback."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp.test_utils import TestServer

from bench import outputs, peers, process, record, report, run, serve, trace
from bench import test_speed as speed
from bench.errors import BenchError
from tests.unit import fake_server

_FAKE = Path(fake_server.__file__)


@pytest.fixture
async def base_url(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """A running fake server; parametrize indirectly with a fault."""
    server = TestServer(fake_server.make_app(getattr(request, "param", "")))
    await server.start_server()
    yield str(server.make_url("")).rstrip("/")
    await server.close()


def with_fault(name: str) -> pytest.MarkDecorator:
    assert name in fake_server.FAULTS
    return pytest.mark.parametrize("base_url", [name], indirect=True)


@pytest.mark.parametrize("api", ["completions", "chat"])
async def test_clients_run_together(base_url: str, api: str) -> None:
    target = serve.Target(base_url, "fake", api)
    async with serve.new_session() as session:
        streams = await serve.run_clients(session, target, ["one two", "three", "four"], 6)
    assert [stream.num_tokens for stream in streams] == [6, 6, 6]
    assert len({stream.text for stream in streams}) == 3
    for stream in streams:
        assert stream.start < stream.first_byte <= stream.times[0] < stream.end
    assert max(s.start for s in streams) < min(s.end for s in streams)
    summary = trace.summarize(streams)
    assert all(value is not None and value > 0 for value in summary.values())


@pytest.mark.parametrize(
    ("base_url", "message"),
    [
        ("short", "has 4 tokens, asked were 5"),
        ("no_done", r"without \[DONE\]"),
        ("error_frame", "out of pages"),
        ("not_json", "not JSON"),
        ("refuse", "answers 429: the queue is full"),
    ],
    indirect=["base_url"],
)
async def test_bad_streams_are_errors(base_url: str, message: str) -> None:
    async with serve.new_session() as session:
        with pytest.raises(BenchError, match=message):
            await serve.run_clients(session, serve.Target(base_url, "fake"), ["a", "b"], 5)


async def test_no_server() -> None:
    target = serve.Target(f"http://127.0.0.1:{process.free_port()}", "fake")
    async with serve.new_session() as session:
        with pytest.raises(BenchError, match="no server answers at http"):
            await serve.run_clients(session, target, ["a"], 5)
        with pytest.raises(BenchError, match="no server answers at http"):
            await serve.find_model(session, target.base_url)


async def test_chat_refuses_token_ids() -> None:
    with pytest.raises(BenchError, match="token ids"):
        serve.Target("http://x", "fake", "chat").body([1, 2], 3)


async def test_model_and_vocabulary(base_url: str) -> None:
    async with serve.new_session() as session:
        assert await serve.find_model(session, base_url) == ("fake", 1000)


async def test_check_outputs(base_url: str) -> None:
    async with serve.new_session() as session:
        count = await outputs.check_outputs(session, serve.Target(base_url, "fake"))
    assert count == 20


@with_fault("batch_dependent")
async def test_check_finds_batch_dependence(base_url: str) -> None:
    async with serve.new_session() as session:
        with pytest.raises(outputs.WrongOutputError, match="among 8 clients differs"):
            await outputs.check_outputs(session, serve.Target(base_url, "fake"))


async def run_main(*argv: str) -> int:
    """run.main off the loop, because it starts one of its own."""
    return await asyncio.to_thread(run.main, list(argv))


async def test_run_writes_results_and_plots(
    base_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "one.jsonl"
    short = ("--clients", "1,2", "--runs", "3", "--max_tokens", "8", "--prefill_tokens", "20")
    assert await run_main("--url", base_url, "--out", str(out), *short) == 0
    text = capsys.readouterr().out
    assert "20 greedy outputs agree" in text
    assert "host time a decode step (asked: <= 1500) ok" in text
    records = record.read(out)
    assert [entry["kind"] for entry in records] == ["first_byte", "prefill", "serve", "serve"]
    cell = records[-1]
    assert (cell["clients"], len(cell["raw"]), len(cell["raw"][0])) == (2, 3, 2)
    assert len(cell["raw"][0][0]["frames_ms"]) == 8
    assert cell["median"]["host_us_per_step"] == pytest.approx(250)
    assert {"git", "command", "machine", "versions", "time"} <= set(cell)
    assert report.main([str(out), str(out)]) == 0
    if "note: no plots" not in text:
        for name in ("throughput", "latency"):
            assert (tmp_path / f"one-{name}.png").read_bytes()[:4] == b"\x89PNG"


@with_fault("batch_dependent")
async def test_run_stops_at_wrong_outputs(
    base_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run_main("--url", base_url, "--out", str(tmp_path / "none")) == 1
    assert "greedy text" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_run_shows_why_a_server_does_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "print('tensor x is missing'); raise SystemExit(2)"]
    monkeypatch.setattr(run, "server_command", lambda args, port: command)
    assert run.main(["--out", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "exit code 2" in error
    assert "tensor x is missing" in error


def test_command_that_does_not_exist() -> None:
    with pytest.raises(BenchError, match="cannot start no-such-server"):
        process.Server(["no-such-server"], 1).__enter__()


def test_server_that_is_never_ready() -> None:
    server = process.Server(
        [sys.executable, "-c", "import time; time.sleep(60)"], process.free_port()
    )
    with pytest.raises(BenchError, match=r"not ready after 0\.1 s"), server:
        server.wait_ready(0.1)


def test_real_process_from_start_to_stop() -> None:
    port = process.free_port()
    with process.Server([sys.executable, str(_FAKE), str(port)], port) as server:
        assert server.wait_ready(20) == server.ready_s > 0
        assert 0 <= server.idle_cpu_percent(0.1) < 100
        assert process.cpu_seconds(server.pid) > 0
        assert (process.peak_rss_bytes(server.pid) or 0) > 1 << 20
        pid = server.pid
    assert process.peak_rss_bytes(pid) is None


def test_server_that_dies_is_reported() -> None:
    server = process.Server([sys.executable, "-c", "raise SystemExit(9)"], process.free_port())
    with pytest.raises(BenchError, match="during the benchmark with exit code 9"), server:
        assert server._process is not None
        server._process.wait()


def test_server_that_dies_under_load() -> None:
    async def load(target: serve.Target) -> None:
        async with serve.new_session() as session:
            await serve.run_clients(session, target, ["a"], 4)

    port = process.free_port()
    server = process.Server([sys.executable, str(_FAKE), str(port), "dies"], port)
    with (
        pytest.raises(BenchError, match=r"connection(?s:.*)last lines(?s:.*)expert 7 is gone"),
        server,
    ):
        server.wait_ready(20)
        asyncio.run(load(serve.Target(server.base_url, "fake")))


def test_peers_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"{sys.executable} {_FAKE} {{port}}"
    out = tmp_path / "peers.jsonl"
    argv = ["--model", "m.gguf", "--ours", command, "--peer", command, "--clients", "1,2"]
    argv += ["--rounds", "1", "--max_tokens", "8", "--api", "chat", "--out", str(out)]
    argv += ["--step_mb", "1=460", "--bandwidth", "50"]
    assert peers.main(argv) == 0
    text = capsys.readouterr().out
    assert "decode 2" in text
    assert "prefill 512" in text
    entries = record.read(out)
    assert {entry["server"] for entry in entries} == {"ours", "peer"}
    assert len(entries) == 2 * 3


def test_peers_name_the_server_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "m", "--rounds", "1", "--ours", "false {port}", "--peer", "false {port}"]
    assert peers.main(argv) == 2
    assert "exit code 1" in capsys.readouterr().err
    assert peers.main([*argv, "--extra", "[]"]) == 2
    assert "--extra is not a JSON object" in capsys.readouterr().err


async def run_speed(*argv: str) -> int:
    return await asyncio.to_thread(speed.main, list(argv))


async def test_speed_prints_the_published_lines(
    base_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = base_url + "/v1/chat/completions"
    args = ("--prompt_lens", "1024", "--max_tokens", "16", "--concurrent", "2")
    assert await run_speed("--api_url", url, *args) == 0
    lines = capsys.readouterr().out.splitlines()
    for i in range(2):
        mine = [line for line in lines if line.startswith(f"[Request {i}] ")]
        assert len(mine) > 2  # text first
        assert mine[-2] == f"[Request {i}] prefill speed: 2048.0"
        assert mine[-1] == f"[Request {i}] decode speed: 64.0"
    assert lines[-4:-1] == [
        "concurrency: 2",
        "total prefill speed: 4096.0",
        " total decode speed: 128.0",
    ]
    assert lines[-1].startswith("wall clock: 32 tokens in ")
    texts = [[ln for ln in lines if ln.startswith(f"[Request {i}] w")] for i in range(2)]
    assert [ln[12:] for ln in texts[0]] != [ln[12:] for ln in texts[1]]  # different prompts


async def test_speed_same_prompt(base_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = base_url + "/v1/chat/completions"
    assert await run_speed("--api_url", url, "--concurrent", "2", "--same_prompt") == 0
    lines = capsys.readouterr().out.splitlines()
    texts = [[ln[12:] for ln in lines if ln.startswith(f"[Request {i}] w")] for i in range(2)]
    assert texts[0] == texts[1] != []


@with_fault("refuse")
async def test_speed_reports_a_refusal(base_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run_speed("--api_url", base_url + "/v1/chat/completions") == 2
    assert "429: the queue is full" in capsys.readouterr().err


@with_fault("no_usage")
async def test_speed_needs_usage(base_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run_speed("--api_url", base_url + "/v1/chat/completions") == 2
    assert "no speed can be computed" in capsys.readouterr().err


def test_speed_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{process.free_port()}/v1/chat/completions"
    assert speed.main(["--api_url", url, "--model", "m"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no server answers" in error
