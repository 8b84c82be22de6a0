"""Steps built by hand: what the scheduler would write, for tests of programs and sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kt_async.ffi import structs
from kt_async.ffi.model import CpuModel
from kt_async.ffi.pool import Pool

PARAMS = np.dtype(structs.SampleParams)
F32 = npt.NDArray[np.float32]


@dataclass(eq=False)
class Tensor:
    """A tensor in GGUF order with its description."""

    data: npt.NDArray[np.generic]
    shape: tuple[int, ...]
    type: int = 0  # F32

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes


@dataclass
class Row:
    """One sequence: its pages and how many positions they hold already."""

    pages: list[int]
    length: int = 0


@dataclass
class Step:
    """Rows of a step: (sequence, its new token ids)."""

    rows: Sequence[tuple[Row, Sequence[int]]]
    samples: npt.NDArray[np.void]
    bias: Sequence[tuple[int, float]] = ()
    history: Sequence[tuple[int, int]] = ()
    mask: npt.NDArray[np.uint32] | None = None
    num_prompt: Sequence[int] | None = None  # per row; None: no token belongs to a prompt


def sample_rows(count: int) -> npt.NDArray[np.void]:
    """Greedy parameters for `count` logit rows."""
    rows = np.zeros(count, PARAMS)
    rows["target"] = -1
    rows["num_logprobs"] = -1
    rows["mask_row"] = -1
    rows["top_p"] = 1
    rows["repetition_penalty"] = 1
    return rows


class Block:
    """The metadata block of a step, its layout and plan."""

    def __init__(self, step: Step, page_size: int = 16) -> None:
        arrays = _arrays(step, page_size)
        self.layout = structs.sized(structs.BlockLayout)
        offset = 0
        for name, array in arrays.items():
            setattr(self.layout, name, offset)
            offset += -(-max(array.nbytes, 1) // 64) * 64
        self.layout.num_bytes = offset
        self.bytes = np.zeros(offset, np.uint8)
        for name, array in arrays.items():
            start = getattr(self.layout, name)
            self.bytes[start : start + array.nbytes] = array.view(np.uint8)
        self.plan = structs.sized(
            structs.Plan,
            num_tokens=arrays["tokens"].size,
            num_rows=len(step.rows),
            num_samples=len(step.samples),
            num_page_ids=arrays["page_ids"].size,
            num_bias=len(step.bias),
            num_history=len(step.history),
        )

    def array(
        self, name: str, count: int, dtype: npt.DTypeLike = np.int32
    ) -> npt.NDArray[np.int32]:
        """A writable view, to damage a step on purpose."""
        return self.bytes[getattr(self.layout, name) :].view(dtype)[:count]


def _arrays(step: Step, page_size: int) -> dict[str, npt.NDArray[np.generic]]:
    tokens, positions, token_row, kv_slot = [], [], [], []
    row_start, context_len, page_start, pages = [0], [], [0], []
    for row, (sequence, ids) in enumerate(step.rows):
        for i, token in enumerate(ids):
            position = sequence.length + i
            tokens.append(token)
            positions.append(position)
            token_row.append(row)
            page = sequence.pages[position // page_size]
            kv_slot.append(page * page_size + position % page_size)
        length = sequence.length + len(ids)
        used = -(-length // page_size)
        row_start.append(len(tokens))
        context_len.append(length)
        pages += sequence.pages[:used]
        page_start.append(len(pages))
    i32 = {
        "tokens": tokens,
        "positions": positions,
        "token_row": token_row,
        "kv_slot": kv_slot,
        "row_start": row_start,
        "context_len": context_len,
        "page_start": page_start,
        "num_prompt": step.num_prompt or [0] * len(step.rows),
        "bias_ids": [b[0] for b in step.bias],
        "history_ids": [h[0] for h in step.history],
        "history_counts": [h[1] for h in step.history],
        "page_ids": pages,
    }
    arrays: dict[str, npt.NDArray[np.generic]] = {k: np.array(v, np.int32) for k, v in i32.items()}
    arrays["samples"] = np.ascontiguousarray(step.samples)
    arrays["bias_values"] = np.array([b[1] for b in step.bias], np.float32)
    return arrays


@dataclass
class Result:
    """Arrays for kt_sample_out."""

    rows: int
    mask: npt.NDArray[np.uint32] | None = None
    tokens: npt.NDArray[np.int32] = field(init=False)
    logprobs: F32 = field(init=False)
    top_ids: npt.NDArray[np.int32] = field(init=False)
    top_logprobs: F32 = field(init=False)

    def __post_init__(self) -> None:
        rows, top = max(self.rows, 1), structs.KT_MAX_LOGPROBS
        self.tokens = np.full(rows, -7, np.int32)
        self.logprobs = np.full(rows, np.nan, np.float32)
        self.top_ids = np.full((rows, top), -7, np.int32)
        self.top_logprobs = np.full((rows, top), np.nan, np.float32)
        self.struct = structs.sized(
            structs.SampleOut,
            num_samples=self.rows,
            tokens=self.tokens.ctypes.data,
            logprobs=self.logprobs.ctypes.data,
            top_ids=self.top_ids.ctypes.data,
            top_logprobs=self.top_logprobs.ctypes.data,
            mask=None if self.mask is None else self.mask.ctypes.data,
        )


class Program:
    """A CpuModel with tensors kept alive and names for buffers."""

    def __init__(self, pool: Pool, *, vocab: int = 32, page_size: int = 16, **config: int) -> None:
        values = {
            "max_tokens": 64,
            "max_rows": 8,
            "max_logit_rows": 64,
            "num_pages": 64,
            "kv_type": structs.KT_KV_F32,
            "sample_vocab": vocab,
            **config,
        }
        self.page_size = page_size
        self.vocab = vocab
        self.model = CpuModel(
            pool,
            structs.sized(structs.ModelConfig, vocab_size=vocab, page_size=page_size, **values),
        )
        self._alive: list[Tensor] = []

    def weight(self, tensor: Tensor | F32, kind: int = structs.KT_WEIGHT_MATRIX) -> int:
        if isinstance(tensor, np.ndarray):
            tensor = Tensor(np.ascontiguousarray(tensor, np.float32), tensor.shape)
        self._alive.append(tensor)
        return self.model.add_weight(tensor, tensor.data.ctypes.data, kind)

    def vector(self, values: F32) -> int:
        return self.model.add_vector(np.ascontiguousarray(values, np.float32))

    def table(self, values: F32) -> int:
        return self.weight(values, structs.KT_WEIGHT_BORROW)

    def embed(self, table: F32) -> int:
        """A buffer that holds table[token]: how a test feeds values into a program."""
        out = self.model.add_buffer(table.shape[1], False)
        self.model.add_op(structs.KT_OP_EMBED, outputs=[out], weights=[self.table(table)])
        return out

    def finish(self, x: int, width: int, head: F32 | None = None) -> None:
        """Gather, project to the vocabulary, name the logits."""
        rows = self.model.add_buffer(width, True)
        self.model.add_op(structs.KT_OP_GATHER, inputs=[x], outputs=[rows])
        if head is None:
            head = np.eye(self.vocab, width, dtype=np.float32)
        logits = self.model.add_buffer(self.vocab, True)
        self.model.add_op(
            structs.KT_OP_LINEAR, inputs=[rows], outputs=[logits], weights=[self.weight(head)]
        )
        self.logits = logits
        self.model.finish(logits)

    def run(self, step: Step) -> Result:
        """Run a step; the sequences grow by their new tokens."""
        block = Block(step, self.page_size)
        result = Result(len(step.samples), step.mask)
        self.run_block(block, result)
        for sequence, ids in step.rows:
            sequence.length += len(ids)
        return result

    def run_block(self, block: Block, result: Result) -> None:
        self.model.run(block.plan, block.layout, block.bytes.ctypes.data, result.struct)

    def read(self, buffer: int, count: int) -> F32:
        return self.model.read(buffer, 0, count)

    def close(self) -> None:
        self.model.close()
