"""Result files: JSON lines that carry everything needed to judge a figure later."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson

from bench.errors import BenchError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
_PACKAGES = ("aiohttp", "numpy", "orjson", "tokenizers", "torch", "uvloop")


def git_id(root: Path = ROOT) -> str:
    """Short commit id, "+" when the tree is changed, "unknown" outside a checkout."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],  # noqa: S607 - the user's git
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],  # noqa: S607
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if status.strip() else "")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _governor() -> str | None:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text().strip() if path.exists() else None


def machine() -> dict[str, Any]:
    """CPU, its cores that we may use, memory and kernel."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "governor": _governor(),
        "kernel": platform.release(),
        "load_1min": os.getloadavg()[0],
    }


def busy_note() -> str | None:
    """A warning when other work takes part of the cores, which makes every time too long."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load < 0.5 * cores:
        return None
    return f"note: the machine is busy (load {load:.1f} on {cores} cores); times will be too long"


def versions() -> dict[str, str]:
    """Python and the packages that decide speed, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class ResultFile:
    """Appends records to a JSON-lines file; each carries git id, command, machine and versions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        now = datetime.datetime.now(datetime.UTC)
        self._common = {
            "time": now.isoformat(timespec="seconds"),
            "git": git_id(),
            "command": shlex.join(sys.argv),
            "machine": machine(),
            "versions": versions(),
        }

    @staticmethod
    def default_path(stem: str) -> Path:
        """results/<stem>-<UTC time>.jsonl; git ignores the folder."""
        now = datetime.datetime.now(datetime.UTC)
        return RESULTS / f"{stem}-{now:%Y%m%d-%H%M%S}.jsonl"

    def append(self, kind: str, record: Mapping[str, Any]) -> None:
        """Add one line. Raises BenchError when the file cannot be written."""
        line = orjson.dumps({"kind": kind, **self._common, **record}) + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as out:
                out.write(line)
        except OSError as error:
            raise BenchError(f"cannot write {self.path}: {error.strerror}") from None


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a result file.

    Raises BenchError naming the file and line when it cannot be read or is not JSON lines.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise BenchError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or "kind" not in record:
            raise BenchError(f"{path} line {number} is not a result record (no kind)")
        records.append(record)
    return records
