"""What the scheduler shares and limits, seen by a client of the real server."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import Server
from tests.e2e.test_server import complete

pytestmark = pytest.mark.e2e

TEXT = "The town lies on a river, and every boat that passes it carries something new. " * 12


def test_a_second_turn_reuses_the_first_and_says_so(server: Server) -> None:
    first = complete(server, TEXT, 16)
    answer = first["choices"][0]["text"]
    again = complete(server, TEXT, 16)
    longer = complete(server, TEXT + answer, 4)
    assert again["choices"][0]["text"] == answer
    for usage in (again["usage"], longer["usage"]):
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert usage["prompt_tokens"] - 64 <= cached < usage["prompt_tokens"]


def test_many_at_once_share_a_prefix_and_keep_their_text(
    make_server: Callable[..., Server],
) -> None:
    prompts = [f"{TEXT} Question {i}:" for i in range(8)]
    texts = []
    for flags in ([], ["--no-prefix-cache"]):
        server = make_server(*flags)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda p, s=server: complete(s, p, 12), prompts))
        texts.append([answer["choices"][0]["text"] for answer in answers])
        cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]
        assert (max(cached) > 0) == (not flags)
    assert texts[0] == texts[1]
