"""The README's list of request fields is the list of request fields."""

from __future__ import annotations

import re
from pathlib import Path

from kt_async.api.bodies import ChatBody, CompletionBody
from kt_async.api.openai import routes as openai_routes
from kt_async.api.ops import routes as ops_routes

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## HTTP API", 1)[1].split("\n## ", 1)[0]


def rows(title: str) -> list[str]:
    return SECTION.split(f"| {title} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]


def test_fields() -> None:
    listed = [name for row in rows("fields") for name in re.findall(r"`(\w+)`", row.split("|")[2])]
    known = {*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__}
    assert set(listed) - {"text"} == known  # `text` is a value there


def test_routes() -> None:
    listed = {
        p.split("`")[0]
        for row in rows("route")
        for p in re.findall(r"(/[^`]*)`", row.split("|")[1])
    }
    served = {re.sub(r":[^}]*", "", r.path) for r in (*openai_routes(), *ops_routes())}
    assert listed == served
