"""Load a model onto the GPU: dense weights and, as configured, experts in VRAM or on the CPU."""

from __future__ import annotations

import logging
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from kt_async.engine.cpu_program import ProgramRecorder
from kt_async.engine.cuda.args import MatrixArg
from kt_async.engine.cuda.calibrate import measure_rates
from kt_async.engine.cuda.copies import ExpertCopies, HostBuffers, pin_experts
from kt_async.engine.cuda.cpu_part import CpuPart
from kt_async.engine.cuda.experts import Names, VramExperts, moe_names
from kt_async.engine.cuda.handoff import Channel, HandoffExperts, Launch
from kt_async.engine.cuda.kernels import kernels_for, launcher
from kt_async.engine.cuda.kv import FP8, KvPages
from kt_async.engine.cuda.ops import CudaOps, RoutedExperts
from kt_async.engine.cuda.probe import choose_mechanism
from kt_async.engine.cuda.runner import CudaLimits, CudaRunner
from kt_async.engine.cuda.stream import StreamedExperts
from kt_async.engine.cuda.values import FloatMatrix, PackedMatrix, Weight
from kt_async.ffi import structs
from kt_async.ffi.handoff import ExpertSet, Handoff, PackedPart, packed_matrix
from kt_async.ffi.matrix import Matrix, dequantize
from kt_async.ffi.pool import Pool
from kt_async.model import FORWARDS
from kt_async.model.spec import ModelSpec
from kt_async.weights.source import ModelFiles

log = logging.getLogger(__name__)

# Types whose R16 bands the CUDA kernels read (linear.cu); the others become bf16 in VRAM.
KERNEL_TYPES = frozenset({2, 3, 6, 7, 8, 12, 13, 14, 20, 23, 39})
_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """What decides how a model is spread between GPU and CPU.

    experts_in_vram: all routed experts; vram_layers: those of these layers, otherwise.
    """

    experts_in_vram: bool = False
    use_graphs: bool = True
    cache_dir: Path | None = None
    show_progress: bool | None = None
    # Prompt chunks of experts in host memory: auto shares them between GPU and CPU by measured
    # rates, cpu leaves all to the CPU, gpu copies all to the GPU.
    prompt_experts: str = "auto"
    vram_layers: tuple[int, ...] = ()
    handoff: str = ""  # one of handoff.MECHANISMS; empty = the first that works


def dense_bytes(files: ModelFiles) -> int:
    """Bytes in VRAM of everything that is not a routed expert; types without a kernel as bf16."""
    total = 0
    for name, info in files.tensors.items():
        if "_exps." in name:
            continue
        if info.type in KERNEL_TYPES or info.type in _FLOATS:
            total += info.num_bytes
        else:
            total += 2 * math.prod(info.shape)
    return total


@dataclass(slots=True)
class _Loader:
    """Moves tensors to their places."""

    files: ModelFiles
    pool: Pool
    weights: dict[str, Weight] = field(default_factory=dict)
    shapes: dict[str, MatrixArg] = field(default_factory=dict)

    def native(self, name: str) -> structs.Tensor:
        info = self.files.tensors[name]
        return structs.tensor_at(info.type, info.shape, info.num_bytes, self.files.address(name))

    def vector(self, name: str) -> None:
        info = self.files.tensors[name]
        values = dequantize(info.type, self.files.data(name))
        self.weights[name] = torch.from_numpy(values).cuda()

    def matrix(self, name: str) -> None:
        """A dense matrix, or all experts of a tensor, into VRAM."""
        kind = self.files.tensors[name].type
        experts, rows, cols = structs.matrix_shape(self.files.tensors[name].shape)
        data = self.files.data(name)
        if kind in _FLOATS:
            tensor = torch.from_numpy(data.copy()).view(_FLOATS[kind])
            self.weights[name] = FloatMatrix(tensor.view(rows, cols).cuda())
        elif kind in KERNEL_TYPES:
            with Matrix(self.pool, kind, data, rows, cols, experts) as packed:
                part = packed_matrix(packed.handle)
                bytes_ = torch.from_numpy(part.data).cuda().view(-1)
            self.weights[name] = PackedMatrix(bytes_, matrix_arg(part, bytes_.data_ptr()), experts)
        else:
            values = torch.from_numpy(dequantize(kind, data)).to(torch.bfloat16)
            self.weights[name] = FloatMatrix(values.view(rows, cols).cuda())
        self.files.release(name)


def matrix_arg(part: PackedPart, address: int) -> MatrixArg:
    """The kernels' description of a whole tensor from one of its parts."""
    bands = -(-part.rows // 16)
    return MatrixArg(
        address, part.band_bytes, bands * part.band_bytes, part.type, part.rows, part.cols, bands
    )


def empty_caches() -> None:
    """Give back the GPU memory that an engine before this one, ended by now, has left.

    torch keeps freed blocks, and for every stream on which cuBLAS ran a workspace of 32 MiB: the
    streams of the next engine are others.
    """
    torch._C._cuda_clearCublasWorkspaces()  # there is no public way
    torch.cuda.empty_cache()


def load_cuda_runner(
    files: ModelFiles,
    spec: ModelSpec,
    pool: Pool,
    layout: structs.BlockLayout,
    limits: CudaLimits,
    options: CudaOptions,
) -> CudaRunner:
    """Load everything and capture the graphs. Raises EngineError, NativeError."""
    loader = _Loader(files, pool)
    recorder = ProgramRecorder(files)
    FORWARDS[spec.architecture](recorder, spec)
    names = cpu_layers(spec, options)
    expert_tensors = {name for layer in names for name in layer}
    uses = [u for u in recorder.weight_uses() if u[0] in files.tensors]
    cpu_experts = ExpertSet(pool, layout.max_tokens, spec.top_k) if names else None
    _load_tensors(loader, uses, expert_tensors, cpu_experts, names, options)
    types = {files.tensors[name].type for name, _ in uses} & KERNEL_TYPES
    kernels = kernels_for(types, options.cache_dir)
    pages = KvPages.allocate(
        spec,
        limits.page_size,
        limits.num_pages,
        limits.num_host_pages,
        FP8 if limits.kv_fp8 else torch.bfloat16,
    )
    pinned = [] if cpu_experts is None else pin_experts(cpu_experts, len(names))
    decode, prefill, handoff = _expert_backends(
        loader, spec, layout, cpu_experts, names, launcher(kernels), options
    )
    ops = CudaOps(kernels, loader.weights, pages, limits.page_size, prefill)
    if isinstance(prefill, StreamedExperts):
        torch.cuda.synchronize()  # pages were cleared on another stream
        with torch.cuda.stream(ops.prompt_stream):
            _prepare_streaming(prefill, loader, spec, names, ops, options, overlap=bool(pinned))
    runner = CudaRunner(
        ops,
        spec,
        layout,
        limits,
        decode_experts=decode,
        prefill_experts=prefill,
        handoff=handoff,
        use_graphs=options.use_graphs,
    )

    def free() -> None:
        for address in pinned:
            torch.cuda.cudart().cudaHostUnregister(address)
        if cpu_experts is not None:
            cpu_experts.close()
        pool.close()

    runner.on_close = free
    return runner


def cpu_layers(spec: ModelSpec, options: CudaOptions) -> list[Names]:
    """Expert tensors of the layers whose experts the CPU keeps."""
    if options.experts_in_vram:
        return []
    in_vram = {f"blk.{layer}" for layer in options.vram_layers}
    return [names for names in moe_names(spec) if names[0].rpartition(".ffn_")[0] not in in_vram]


def _load_tensors(
    loader: _Loader,
    uses: list[tuple[str, int]],
    expert_tensors: set[str],
    cpu_experts: ExpertSet | None,
    names: list[Names],
    options: CudaOptions,
) -> None:
    files = loader.files
    total = sum(files.tensors[name].num_bytes for name, _ in uses)
    hide = not sys.stderr.isatty() if options.show_progress is None else not options.show_progress
    begin = time.monotonic()
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=hide) as bar:
        for name, kind in uses:
            if name in expert_tensors and cpu_experts is not None:
                continue
            if kind == structs.KT_WEIGHT_VECTOR:
                loader.vector(name)
            else:
                loader.matrix(name)
            bar.update(files.tensors[name].num_bytes)
        for layer in names if cpu_experts is not None else []:
            assert cpu_experts is not None
            cpu_experts.add_layer(*(loader.native(name) for name in layer))
            for name in layer:
                files.release(name)
                bar.update(files.tensors[name].num_bytes)
    if cpu_experts is not None:
        cpu_experts.finish()
        for number, layer in enumerate(names):
            for which, name in enumerate(layer):
                part = cpu_experts.parts(number, which)[0]
                loader.shapes[name] = matrix_arg(part, 0)
    seconds = time.monotonic() - begin
    log.info("loaded %.2f GB in %.1f s", total * 1e-9, seconds)


def _expert_backends(
    loader: _Loader,
    spec: ModelSpec,
    layout: structs.BlockLayout,
    cpu_experts: ExpertSet | None,
    names: list[Names],
    launch: Launch,
    options: CudaOptions,
) -> tuple[RoutedExperts, RoutedExperts, Handoff]:
    packed = {n: w for n, w in loader.weights.items() if isinstance(w, PackedMatrix)}
    vram = VramExperts(packed)
    no_handoff = structs.sized(structs.HandoffConfig)
    if cpu_experts is None:
        return vram, vram, Handoff(no_handoff, None)
    layer_of = {layer[0]: number for number, layer in enumerate(names)}
    prefill = StreamedExperts(
        cpu=CpuPart(
            cpu_experts,
            HostBuffers.allocate(layout.max_tokens, spec.hidden_size, spec.top_k, spec.num_experts),
        ),
        layer_of=layer_of,
        num_experts=spec.num_experts,
        vram=vram,
    )
    if not options.use_graphs:
        return prefill, prefill, Handoff(no_handoff, None)
    channel = Channel.open(
        choose_mechanism(launch, options.handoff),
        cpu_experts,
        (len(names), layout.max_rows, spec.hidden_size, spec.top_k),
    )
    return HandoffExperts(channel, layer_of, vram), prefill, channel.native


def _prepare_streaming(
    prefill: StreamedExperts,
    loader: _Loader,
    spec: ModelSpec,
    names: list[Names],
    ops: CudaOps,
    options: CudaOptions,
    *,
    overlap: bool,
) -> None:
    # A type without a CUDA kernel cannot be used from a copy: the CPU computes it.
    types = {loader.files.tensors[name].type for layer in names for name in layer}
    if types <= KERNEL_TYPES and options.prompt_experts != "cpu":
        prefill.copies = ExpertCopies(prefill.cpu.cpu, names, loader.shapes, spec.num_experts)
        if options.prompt_experts == "auto":
            measure_rates(prefill, ops, spec, FORWARDS[spec.architecture], overlap=overlap)
