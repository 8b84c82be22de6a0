"""`make bench` and test_speed.py against a real server on the demo model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import record
from tests.e2e.conftest import Server

pytestmark = pytest.mark.e2e

_ROOT = Path(__file__).resolve().parents[2]


def bench(script: str, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(_ROOT / "bench" / script), *argv]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=50, env=dict(os.environ), check=False
    )


def test_run_measures_everything(tmp_path: Path) -> None:
    out = tmp_path / "result.jsonl"
    short = [
        "--runs",
        "1",
        "--starts",
        "1",
        "--clients",
        "1,4",
        "--idle_s",
        "1",
        "--max_tokens",
        "16",
    ]
    done = bench("run.py", "--out", str(out), "--no_plots", *short)
    assert done.returncode == 0, done.stderr
    for figure in ("/health ready", "idle server", "first SSE byte", "host time"):
        assert figure in done.stdout
    assert "core wait" in done.stdout
    kinds = [entry["kind"] for entry in record.read(out)]
    assert kinds == ["start", "first_byte", "prefill", "serve", "serve", "memory"]


def test_run_says_why_the_server_did_not_start(tmp_path: Path) -> None:
    done = bench("run.py", "--out", str(tmp_path / "x"), "--gguf_path", str(tmp_path / "none.gguf"))
    assert done.returncode == 2
    assert "none.gguf does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_ended_run_leaves_no_server(tmp_path: Path) -> None:
    script = str(_ROOT / "bench" / "run.py")
    command = [sys.executable, script, "--out", str(tmp_path / "x"), "--starts", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as out:
        while "outputs agree" not in (line := out.readline()):
            assert line, "the run ended by itself"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.terminate()
        assert process.wait(30) == 130
    assert len(children) == 1
    assert not Path(f"/proc/{children[0]}").exists()


def test_speed_script(server: Server) -> None:
    url = server.base_url + "/v1/chat/completions"
    argv = ["--prompt_lens", "1024", "--max_tokens", "8", "--concurrent", "2", "--ignore_eos"]
    done = bench("test_speed.py", "--api_url", url, *argv)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("] prefill speed: " in line for line in lines) == 2
    assert "concurrency: 2" in lines
    assert lines[-1].startswith("wall clock: 16 tokens")
