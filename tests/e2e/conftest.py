"""A real `python -m kt_async` in a subprocess, on the demo model and a free loopback port."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_START_LIMIT_S = 60.0


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A running server process."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        """Parsed JSON of a GET; error bodies too."""
        try:
            with urllib.request.urlopen(self.base_url + path, timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def text(self, path: str) -> str:
        with urllib.request.urlopen(self.base_url + path, timeout=10) as answer:
            return str(answer.read().decode())

    def post(self, path: str, body: Any) -> tuple[int, Any, Any]:
        """(status, parsed body, headers) of a POST."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.base_url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, json.load(error), error.headers

    def metric(self, name: str) -> float:
        """Sum of a metric's samples in /metrics."""
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in self.text("/metrics").splitlines()
            if line.startswith((name + " ", name + "{"))
        ]
        assert values, f"no metric {name}"
        return sum(values)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


def start_server(log: Path, *flags: str) -> Server:
    """Start and wait until /health answers 200."""
    port = free_port()
    command = [sys.executable, "-m", "kt_async", "--port", str(port), *flags]
    env = {k: v for k, v in os.environ.items() if not k.startswith("KT_ASYNC_")}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    server = Server(process, port, log)
    deadline = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"server ended with {process.returncode}:\n{log.read_text()}")
        try:
            with urllib.request.urlopen(server.base_url + "/health", timeout=5):
                return server
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)  # readiness is polled; nothing depends on the interval
    process.kill()
    raise AssertionError(f"server not ready after {_START_LIMIT_S} s:\n{log.read_text()}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that do not need their own flags."""
    log = tmp_path_factory.mktemp("server") / "log"
    running = start_server(log, "--max_batch_size", "8", "--log_level", "info")
    yield running
    assert running.stop() == 0, log.read_text()


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers with flags of a test's own; all are stopped after it."""
    started: list[Server] = []

    def make(*flags: str) -> Server:
        started.append(start_server(tmp_path / f"log{len(started)}", *flags))
        return started[-1]

    yield make
    for running in started:
        running.stop()
