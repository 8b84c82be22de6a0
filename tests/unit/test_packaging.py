"""pyproject, pinned versions, Makefile and CI agree with each other and with the code."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kt_async

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# Import name -> distribution name, where they differ.
DISTRIBUTIONS = {"yaml": "pyyaml", "flashinfer": "flashinfer-python"}
# Used when importable, declared as extras.
OPTIONAL = {"flashinfer-python", "uvloop", "llguidance"}


def plain(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_every_import_is_declared() -> None:
    declared = {plain(name) for name in PROJECT["project"]["dependencies"]}
    for file in (ROOT / "kt_async").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                if top in sys.stdlib_module_names or top == "kt_async":
                    continue
                needed = DISTRIBUTIONS.get(top, top).lower().replace("_", "-")
                assert needed in declared | OPTIONAL, f"{file.name} imports {top}"


def test_everything_is_pinned() -> None:
    pins = {
        plain(line)
        for line in (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    }
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["uvloop"]]
    assert {plain(name) for name in wanted} - pins == set()


def test_constraints_hold_exact_public_versions() -> None:
    for line in (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert not line or line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), line


def test_version_is_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", kt_async.__version__)
    assert "version" not in PROJECT["project"]
    assert "version" in PROJECT["project"]["dynamic"]


def test_makefile_targets_are_documented_and_phony() -> None:
    assert len(MAKEFILE.splitlines()) <= 120
    match = re.search(r"\.PHONY:((?:.*\\\n)*.*)", MAKEFILE)
    assert match
    phony = set(match[1].replace("\\\n", " ").split())
    documented = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, flags=re.MULTILINE))
    assert documented | {"check-tools"} == phony
    asked = (
        "help serve test test-all native bench bench-kernels lint format types size san fuzz wheel "
        "clean"
    )
    assert set(asked.split()) <= documented


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_help() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"^serve +set everything up", done.stdout, flags=re.MULTILINE)


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_missing_compiler_is_one_sentence() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "native", "CXX=no-such-compiler", "VENV=unused"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stdout.startswith("No C++ compiler (no-such-compiler) found; install one")
    assert len(done.stdout.splitlines()) == 1


def test_ci_script_is_sound() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_nothing_names_a_machine_or_registry() -> None:
    for name in ("Makefile", "pyproject.toml", ".ci/run", ".ci/constraints.txt"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|--index-url|--extra-index|--find-links", text), name


def test_command_line_starts_without_heavy_imports() -> None:
    code = (
        "import sys; import kt_async.cli; "
        "print([m for m in ('torch', 'aiohttp', 'numpy', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
