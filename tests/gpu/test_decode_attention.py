"""The decode attention kernel against torch, and against itself in other company."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from bench.cuda_tools import Acts  # noqa: E402
from kt_async.engine.cuda.args import RopeArg  # noqa: E402
from kt_async.engine.cuda.attention import Heads  # noqa: E402
from kt_async.engine.cuda.decode import PagedDecode  # noqa: E402
from kt_async.engine.cuda.kv import KvPages  # noqa: E402
from kt_async.engine.cuda.ops import CudaOps  # noqa: E402
from kt_async.engine.cuda.values import Rows, address  # noqa: E402
from kt_async.ffi.cuda import Kernels, compile_kernels, kernel_source  # noqa: E402

pytestmark = pytest.mark.gpu

PAGE = 32
PTR, I32, I64, F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
LENGTHS = [1, 2, 16, 17, 128, 129, 300, 1000, 4096, 4097, 5003, 9000]


class FakeBlock:
    """Device arrays by name."""

    def __init__(self, **arrays: Any) -> None:
        self.arrays = {k: torch.tensor(v, dtype=torch.int32).cuda() for k, v in arrays.items()}

    def address(self, name: str) -> int:
        return int(self.arrays[name].data_ptr())


@pytest.fixture(scope="module")
def kernels() -> Any:
    torch.zeros(1).cuda()
    major, minor = torch.cuda.get_device_capability()
    source = kernel_source([12])
    suffix = "a" if major >= 9 else ""
    return Kernels(compile_kernels(source, f"sm_{major}{minor}{suffix}", None))


class Case:
    """Rows of several lengths over random pages."""

    def __init__(self, kernels: Any, heads: Heads, lengths: list[int]) -> None:
        made = torch.Generator().manual_seed(3)
        self.heads, self.lengths = heads, lengths
        starts, ids, slots = [0], [], []
        order = torch.randperm(sum(-(-n // PAGE) for n in lengths), generator=made).tolist()
        for n in lengths:
            count = -(-n // PAGE)
            ids.extend(order[len(ids) : len(ids) + count])
            starts.append(len(ids))
            slots.append(ids[-1] * PAGE + (n - 1) % PAGE)
        self.ids, self.starts = ids, starts
        self.block = FakeBlock(
            page_start=starts,
            page_ids=ids,
            last_page_len=[(n - 1) % PAGE + 1 for n in lengths],
            positions=[n - 1 for n in lengths],
            kv_slot=slots,
        )
        d, kv = heads.head_dim, heads.num_kv_heads
        shape = (len(ids), 2, PAGE, kv, d)
        self.cache = torch.randn(shape, generator=made).to(torch.bfloat16).cuda()
        self.ops = CudaOps(kernels, {}, KvPages([self.cache]), PAGE, None)  # type: ignore[arg-type]
        rows = len(lengths)
        self.qkv = [
            Rows(torch.randn((rows, h * d), generator=made).cuda() * 2, h * d)
            for h in (heads.num_heads, kv, kv)
        ]
        self.norms = [1 + 0.1 * torch.randn(d, generator=made).cuda() for _ in range(2)]
        self.frequencies = (10000.0 ** (-torch.arange(0, d, 2) / d)).float().cuda()
        self.rope = RopeArg(
            self.frequencies.data_ptr(),
            self.norms[0].data_ptr(),
            self.norms[1].data_ptr(),
            1e-6,
            1.0,
            heads.num_heads,
            kv,
            d,
            d,
            1,
        )

    def run(self, rows: list[int]) -> Any:
        """The kernel's output for some of the rows, all in one launch."""
        b = self.block.arrays
        ids = [i for r in rows for i in self.ids[self.starts[r] : self.starts[r + 1]]]
        ends = torch.tensor([self.starts[r + 1] - self.starts[r] for r in rows]).cumsum(0)
        block = FakeBlock(
            page_start=[0, *ends.tolist()],
            page_ids=ids,
            **{n: b[n][rows].tolist() for n in ("last_page_len", "positions", "kv_slot")},
        )
        decode = PagedDecode.allocate(self.heads, block, PAGE, len(rows))  # type: ignore[arg-type]
        qkv = tuple(Rows(x.f32[rows].contiguous(), x.width) for x in self.qkv)
        out = decode(self.ops, qkv, self.rope, self.cache, self.heads.scale)  # type: ignore[arg-type]
        torch.cuda.synchronize()
        return out

    def reference(self) -> tuple[Any, Any]:
        """Output f32 [R, heads, D] and the pages afterwards, by the prefill kernels and torch."""
        heads, rows = self.heads, len(self.lengths)
        cache = self.cache.clone()
        q = torch.empty((rows, heads.num_heads, heads.head_dim), dtype=torch.bfloat16).cuda()
        arguments = [
            *(PTR(address(x.f32)) for x in self.qkv),
            *(I64(x.width) for x in self.qkv),
            PTR(self.block.address("positions")),
            PTR(self.block.address("kv_slot")),
            self.rope,
            F32(1.0),
            I32(PAGE),
            PTR(q.data_ptr()),
            PTR(cache.data_ptr()),
        ]
        stream = torch.cuda.current_stream().cuda_stream
        grid = (rows, heads.num_heads + 2 * heads.num_kv_heads)
        self.ops.kernels.launch("attention_inputs", grid, 32, stream, arguments, 4 * heads.head_dim)
        out = torch.empty((rows, heads.num_heads, heads.head_dim)).cuda()
        group = heads.num_heads // heads.num_kv_heads
        for row, n in enumerate(self.lengths):
            pages = cache[self.ids[self.starts[row] : self.starts[row + 1]]].float()
            k, v = (pages[:, i].reshape(-1, *pages.shape[3:])[:n] for i in (0, 1))
            k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
            weights = (q[row].float().unsqueeze(1) @ k.transpose(1, 2) * heads.scale).softmax(-1)
            out[row] = (weights @ v).squeeze(1)
        return out, cache


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("heads", [(32, 4), (8, 8), (12, 4), (64, 4)])
def test_attention_is_torchs_and_does_not_depend_on_other_rows(
    kernels: Any, heads: tuple[int, int], dim: int
) -> None:
    case = Case(kernels, Heads(*heads, dim, dim**-0.5), LENGTHS)
    expected, cache = case.reference()
    together = case.run(list(range(len(LENGTHS))))
    assert torch.equal(case.cache, cache)
    ours = together.f32.view_as(expected)
    error = ((ours - expected).norm(dim=-1) / expected.norm(dim=-1)).amax(1)
    print({n: f"{e:.1e}" for n, e in zip(LENGTHS, error.tolist(), strict=True)})
    assert error.max() < 6e-3  # weights round to bf16
    made = Acts(together.q, together.meta, together.count)
    values = together.f32.double()
    scale = values.view(len(LENGTHS), -1, 32).abs().amax(2) / 127
    assert torch.allclose(made.scales(), scale.repeat_interleave(32, dim=1))
    assert (made.values() - values).abs().max() <= scale.max() * 0.51
    for row in range(len(LENGTHS)):
        alone = case.run([row])
        assert torch.equal(alone.f32[0], together.f32[row])
        one = Acts(alone.q, alone.meta, 1)
        assert torch.equal(one.values()[0], made.values()[row])
        assert torch.equal(one.sums()[0], made.sums()[row])
    reverse = case.run(list(reversed(range(len(LENGTHS)))))
    assert torch.equal(reverse.f32.flip(0), together.f32)
    many = case.run(list(range(len(LENGTHS))) * 6)  # more rows than a warp looks at once
    assert torch.equal(many.f32, together.f32.repeat(6, 1))
