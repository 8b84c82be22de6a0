"""The C ABI: kt.h is valid C, the library exports exactly it, and Python mirrors it."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kt_async.errors import NativeError
from kt_async.ffi import lib, structs

HEADER = Path(__file__).parents[2] / "native" / "include" / "kt.h"


def header_functions() -> set[str]:
    return set(re.findall(r"KT_API [\w\s*]+?\b(kt_\w+)\(", HEADER.read_text()))


def header_constants() -> dict[str, int]:
    found = re.findall(r"#define (KT_[A-Z0-9_]+) \(?(-?\d+)u?\)?(?:\s|$)", HEADER.read_text())
    return {name: int(value) for name, value in found}


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_header_is_strict_c11(tmp_path: Path) -> None:
    source = tmp_path / "use.c"
    source.write_text('#include "kt.h"\nint main(void) { return kt_abi_version() == 0; }\n')
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wpadded"]
    command = ["cc", *flags, f"-I{HEADER.parent}", "-c", str(source), "-o", str(tmp_path / "use.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_library_exports_the_header_and_nothing_else() -> None:
    command = ["nm", "-D", "--defined-only", str(lib.LIBRARY_PATH)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    exported = {line.split()[2] for line in lines if line.split()[1] in "TDBRW"}
    assert {name for name in exported if not name.startswith(("__", "_init", "_fini"))} == (
        header_functions()
    )


def test_python_declares_every_function_once() -> None:
    assert set(lib._SIGNATURES) == header_functions()


def test_constants_are_those_of_the_header() -> None:
    mirrored = {name: getattr(structs, name, None) for name in header_constants()}
    assert mirrored == header_constants()


def test_layouts_agree() -> None:
    assert lib.layout_differences(lib.load()) == []
    names = set(re.findall(r"typedef struct (kt_\w+) \{", HEADER.read_text()))
    assert {struct for struct, _ in lib.library_layout(lib.load())} == names


def test_a_wrong_struct_size_is_refused() -> None:
    info = structs.sized(structs.HostInfo)
    info.struct_size -= 4
    with pytest.raises(NativeError, match="struct_size") as failure:
        lib.check(lib.load().kt_host_query(ctypes.byref(info)))
    assert failure.value.status == structs.KT_ERR_ABI


def test_a_null_handle_is_refused() -> None:
    with pytest.raises(NativeError, match="NULL"):
        lib.check(lib.load().kt_pool_describe(None, ctypes.create_string_buffer(8), 8))


def test_destroy_accepts_null() -> None:
    library = lib.load()
    for name in sorted(header_functions()):
        if name.endswith("_destroy"):
            assert getattr(library, name)(None) == structs.KT_OK, name
