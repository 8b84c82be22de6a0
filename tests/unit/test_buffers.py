"""Buffer sharing of recorded programs: no value is overwritten while somebody still needs it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kt_async.engine.cpu_program import Operation, Value, assign_buffers


@st.composite
def programs(draw: st.DrawFn) -> list[Operation]:
    """Random operation lists whose inputs are earlier outputs."""
    operations: list[Operation] = []
    for _ in range(draw(st.integers(1, 30))):
        earlier = [op.out for op in operations]
        inputs = draw(st.lists(st.sampled_from(earlier), max_size=3)) if earlier else []
        out = Value(draw(st.sampled_from([8, 16])), draw(st.booleans()))
        same = [
            i for i, v in enumerate(inputs) if (v.width, v.by_sample) == (out.width, out.by_sample)
        ]
        in_place = draw(st.sampled_from([[], same[:1], same]))
        operations.append(Operation(1, out, inputs, in_place=in_place))
    return operations


@given(programs())
def test_inputs_hold_their_value_when_read(operations: list[Operation]) -> None:
    widths: list[tuple[int, bool]] = []

    def new_buffer(width: int, by_sample: bool) -> int:
        widths.append((width, by_sample))
        return len(widths) - 1

    result = operations[-1].out
    assign_buffers(operations, result, new_buffer)
    content: dict[int, int] = {}
    for op in operations:
        for value in op.inputs:
            assert value is not None
            assert content[value.buffer] == id(value)
        assert widths[op.out.buffer] == (op.out.width, op.out.by_sample)
        content[op.out.buffer] = id(op.out)
    assert content[result.buffer] == id(result)


def test_a_chain_needs_two_buffers() -> None:
    first = Value(8)
    operations = [Operation(1, first, [])]
    for _ in range(10):
        operations.append(Operation(1, Value(8), [operations[-1].out]))
    made: list[int] = []

    def new_buffer(width: int, by_sample: bool) -> int:
        made.append(width)
        return len(made) - 1

    assign_buffers(operations, operations[-1].out, new_buffer)
    assert len(made) == 2


def test_a_residual_is_updated_in_place() -> None:
    residual, x = Value(8), Value(4)
    out = Value(8)
    operations = [
        Operation(1, residual, []),
        Operation(1, x, []),
        Operation(1, out, [x, residual], in_place=[1]),
    ]
    buffers = iter(range(3))
    assign_buffers(operations, out, lambda _width, _by_sample: next(buffers))
    assert out.buffer == residual.buffer
