"""Start a server as a child process, wait until it is ready, measure it and stop it. Linux only.

The child's output goes to a temporary file: when it fails, its last lines are the error message.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

from bench.errors import BenchError

_POLL_S = 0.02
_TAIL_LINES = 15
_DYING_S = 0.5
_STOP_S = 20.0  # a drain may take a while; beyond that the server is killed and it is an error


def terminate_as_interrupt() -> None:
    """Let SIGTERM unwind the program as Ctrl-C does, so that no server is left behind.

    To be called by the main thread of a program that starts one.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def fill(command: str, values: Mapping[str, str | int]) -> list[str]:
    """Split a command template and fill {port}, {model} ... in; other braces stay as they are.

    Raises BenchError when the template does not say where the port goes.
    """
    if "port" in values and "{port}" not in command:
        raise BenchError(f"the command has no {{port}} in it: {command}")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise BenchError(f"the command cannot be split ({error}): {command}") from None
    for name, value in values.items():
        words = [word.replace("{" + name + "}", str(value)) for word in words]
    return words


def parse_stat(line: str) -> int:
    """User and system time of a /proc/PID/stat line, in clock ticks."""
    fields = line.rpartition(")")[2].split()  # the name before may hold spaces
    return int(fields[11]) + int(fields[12])


def cpu_seconds(pid: int, proc: Path = Path("/proc")) -> float:
    """CPU time of a process and its threads so far.

    From the scheduler's nanosecond counters where the kernel has them; else from stat, whose ticks
    are 10 ms.
    """
    tasks = list((proc / str(pid) / "task").iterdir())
    try:
        nanos = [int((task / "schedstat").read_text().split()[0]) for task in tasks]
    except (FileNotFoundError, IndexError):
        ticks = parse_stat((proc / str(pid) / "stat").read_text())
        return ticks / os.sysconf("SC_CLK_TCK")
    return sum(nanos) / 1e9


def core_seconds(pid: int) -> tuple[float, float] | None:
    """Seconds that a process's threads have run and have waited for a core so far.

    None when the process is gone or the kernel does not count.
    """
    run = waited = 0
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            fields = (task / "schedstat").read_text().split()
            run, waited = run + int(fields[0]), waited + int(fields[1])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return None
    return run / 1e9, waited / 1e9


def wait_percent(
    before: tuple[float, float] | None, after: tuple[float, float] | None
) -> float | None:
    """Share of its runnable time that a process waited for a core between two core_seconds."""
    if before is None or after is None:
        return None
    run, waited = (b - a for a, b in zip(before, after, strict=True))
    return 100 * waited / (run + waited) if run + waited > 0 else None


def peak_rss_bytes(pid: int) -> int | None:
    """High-water mark of resident memory, or None when the process is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


class Server:
    """A child process that serves HTTP on 127.0.0.1:port. A context manager: leaving it stops it.

    ready_s: seconds from exec to the first 200 of `ready_path`, set by wait_ready.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        ready_path: str = "/health",
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.command = list(command)
        self.port = port
        self.ready_s = 0.0
        self._ready_path = ready_path
        self._cwd = cwd
        self._env = dict(env) if env is not None else None
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._is_reported = False  # its last lines are in an error already

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def __enter__(self) -> Server:
        self._started = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                cwd=self._cwd,
                env=self._env,
            )
        except OSError as error:
            self._log.close()
            raise BenchError(f"cannot start {self.command[0]}: {error.strerror}") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            has_died = isinstance(error, BenchError) and self._ends_within(_DYING_S)
            self.stop(strict=kind is None)
            if has_died and not self._is_reported:
                raise BenchError(f"{error}; the server's last lines:\n{self.tail()}") from None
        finally:
            self._log.close()

    def _ends_within(self, seconds: float) -> bool:
        """Whether the process has ended or does so now: a broken connection comes a bit earlier."""
        assert self._process is not None, "the server was not started"
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait_ready(self, timeout_s: float) -> float:
        """Poll until the server answers 200; returns and keeps the seconds since exec.

        Raises BenchError with the server's last lines when it ends or the time is up.
        """
        url = self.base_url + self._ready_path
        while True:
            if self._answers(url):
                self.ready_s = time.perf_counter() - self._started
                return self.ready_s
            if self._process is not None and self._process.poll() is not None:
                self._is_reported = True
                raise BenchError(
                    f"the server ended with exit code {self._process.returncode} before it was "
                    f"ready; its last lines:\n{self.tail()}"
                )
            if time.perf_counter() - self._started > timeout_s:
                raise BenchError(
                    f"the server was not ready after {timeout_s:g} s; its last lines:\n"
                    f"{self.tail()}"
                )
            time.sleep(_POLL_S)

    @staticmethod
    def _answers(url: str) -> bool:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                return int(reply.status) == 200
        except (urllib.error.URLError, OSError):
            return False

    def idle_cpu_percent(self, seconds: float) -> float:
        """Share of one core the process used while nothing was asked of it."""
        before, begin = cpu_seconds(self.pid), time.perf_counter()
        time.sleep(seconds)
        used = cpu_seconds(self.pid) - before
        return 100 * used / (time.perf_counter() - begin)

    def tail(self, num_lines: int = _TAIL_LINES) -> str:
        """The last lines of the server's output, indented."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").splitlines()[-num_lines:]
        return "\n".join("  " + line for line in lines) or "  (it printed nothing)"

    def stop(self, strict: bool = True) -> None:
        """SIGTERM and wait. With strict, a server that dies badly or hangs is a BenchError."""
        process = self._process
        if process is None:
            return
        ended_before = process.poll() is not None
        if not ended_before:
            process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            if strict:
                raise BenchError(
                    f"the server did not end within {_STOP_S:g} s of SIGTERM"
                ) from None
            return
        if strict and (ended_before or code not in (0, -signal.SIGTERM, 128 + signal.SIGTERM)):
            when = "during the benchmark" if ended_before else "on SIGTERM"
            raise BenchError(
                f"the server ended {when} with exit code {code}; its last lines:\n{self.tail()}"
            )
