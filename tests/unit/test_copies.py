"""Which copies bring a list of experts to the GPU; needs none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from kt_async.engine.cuda.copies import _copies, _Part, _runs

DENSE = _Part(source=1000, target=64, num_bytes=10, stride=10)
SPREAD = _Part(source=1000, target=64, num_bytes=10, stride=25)  # a node's share of a tensor


def test_neighbours_are_copied_together() -> None:
    experts = np.array([0, 1, 2, 5, 7, 8])
    first, count = _runs(experts)
    assert first.tolist() == [0, 5, 7]
    assert count.tolist() == [3, 1, 2]
    copies = _copies(DENSE, 10_000, experts, _runs(experts))
    assert copies.tolist() == [[10_064, 1000, 30], [10_114, 1050, 10], [10_134, 1070, 20]]
    assert len(_copies(SPREAD, 0, experts, _runs(experts))) == len(experts)


@pytest.mark.parametrize("part", [DENSE, SPREAD], ids=["dense", "spread"])
@given(chosen=st.sets(st.integers(0, 40), min_size=1))
def test_every_byte_arrives_at_its_place(part: _Part, chosen: set[int]) -> None:
    experts = np.array(sorted(chosen))
    arrived = {}
    for to, source, size in _copies(part, 0, experts, _runs(experts)).tolist():
        arrived.update({to + i: source + i for i in range(size)})
    expected = {
        part.target + e * part.stride + i: part.source + e * part.num_bytes + i
        for e in chosen
        for i in range(part.num_bytes)
    }
    assert arrived == expected
