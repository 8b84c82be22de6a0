"""The README's flags, commands, files and targets exist; its generated table is up to date."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from kt_async.cli import flag_table
from kt_async.config import options
from kt_async.options import normalise
from kt_async.retired import RETIRED

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BEGIN, END = "<!-- flags: begin -->\n", "<!-- flags: end -->"
# Settings that only a GPU engine reads.
GPU_ONLY: set[str] = set()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_flag_table_is_generated() -> None:
    """Refresh with: python -c "from kt_async.cli import flag_table; print(flag_table())"."""
    assert README.count(BEGIN) == README.count(END) == 1
    table = README.partition(BEGIN)[2].partition(END)[0]
    assert table.strip() == flag_table()


def test_every_flag_is_in_the_table() -> None:
    table = flag_table()
    for name, _, _ in options():
        assert f"| `--{name}` |" in table or f"| `--no-{name}` |" in table


def test_every_setting_is_read() -> None:
    read: set[str] = set()
    for file in (ROOT / "kt_async").rglob("*.py"):
        if file.name in {"config.py", "options.py", "retired.py"}:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    unread = {name for name, _, option in options() if not option.is_command} - read
    assert unread - GPU_ONLY - {"config"} == set()


def test_commands_use_real_flags() -> None:
    valid = {name for name, _, _ in options()} | set(RETIRED) | {"help", "version"}
    valid |= {f"no_{name}" for name in valid}
    commands = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [line for line in commands.splitlines() if "-m kt_async" in line]
    assert lines
    for line in lines:
        for word in shlex.split(line.partition("-m kt_async")[2], comments=True):
            if word.startswith("--"):
                assert normalise(word.partition("=")[0]) in valid, line


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    asked = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, flags=re.MULTILINE))
    assert {"serve", "test"} <= asked
    for target in asked:
        assert re.search(rf"^{target}[ :]", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:[\w.-]+/)+[\w.-]+)`", README))))
def test_named_files_exist(name: str) -> None:
    if name.startswith(("kt_async/", "native/", "rules/", "tests/", "bench/", ".ci/")):
        assert (ROOT / name).exists()


def test_quick_start_is_two_commands() -> None:
    first = blocks("bash")[0]
    lines = [line for line in first.splitlines() if line and not line.startswith("#")]
    assert [line.partition("#")[0].strip() for line in lines] == ["make serve", "make test"]
