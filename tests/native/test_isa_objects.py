"""ISA object files may not export code that a linker could merge into the baseline."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

OBJECTS = Path(__file__).parents[2] / "build" / "native" / "CMakeFiles" / "kt.dir"
ISA_SUFFIXES = ("_scalar", "_avx2", "_avx512", "_avx512vnni", "_amx")


def isa_objects() -> list[Path]:
    return [
        path
        for path in sorted(OBJECTS.rglob("*.cpp.o"))
        if path.name.removesuffix(".cpp.o").endswith(ISA_SUFFIXES)
    ]


def symbols(path: Path) -> list[tuple[str, str]]:
    """(kind letter, name) of every symbol of an object file."""
    text = subprocess.run(
        ["nm", "--portability", str(path)], check=True, capture_output=True, text=True
    ).stdout
    return [(line.split()[1], line.split()[0]) for line in text.splitlines()]


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    if shutil.which("nm") is None or not OBJECTS.is_dir():
        pytest.skip("needs nm and the object files of `make native`")
    return isa_objects()


def test_no_weak_symbols(objects: list[Path]) -> None:
    """A weak function compiled with AVX-512 flags could replace the baseline's copy."""
    assert any(path.name == "matrix_scalar.cpp.o" for path in objects)
    for path in objects:
        weak = [name for kind, name in symbols(path) if kind in "WVu"]
        assert not weak, f"{path.name} exports weak symbols: {weak[:3]}"


def test_one_entry_point_each(objects: list[Path]) -> None:
    """An ISA file is reached through its getter only."""
    for path in objects:
        public = [name for kind, name in symbols(path) if kind in "TDRB"]
        assert len(public) == 1, f"{path.name} exports {public}"
