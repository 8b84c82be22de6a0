"""Our CUDA kernels: compiled at start-up by the NVRTC that PyTorch ships, launched by the driver.

No CUDA headers or nvcc are needed. Compiled code is cached per GPU architecture, source and NVRTC
version. Only imported when a GPU is used.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kt_async.errors import EngineError

log = logging.getLogger(__name__)

# A ctypes number, pointer or structure: typeshed has no public name for their common base.
KernelArgument = Any

_COMPUTE_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_x
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_x
_SHARED_WITHOUT_ASKING = 48 << 10  # bytes
_FIRST_WITH_DEPENDENT_LAUNCH = 9  # compute capability

_SOURCES = (
    "base.cu",
    "formats.cu",
    "linear.cu",
    "step.cu",
    "prefill.cu",
    "prompt_experts.cu",
    "sample.cu",
    "attention.cu",
    "router.cu",
)
_OPTIONS = ("--std=c++17", "-default-device")


def count_gpus() -> int:
    """GPUs that the driver offers this process; 0 without a driver. Does not import torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def source_dir() -> Path:
    """Where the .cu files are: beside this module in a wheel, native/cuda in a checkout."""
    installed = Path(__file__).with_name("cuda")
    return installed if installed.is_dir() else Path(__file__).parents[2] / "native" / "cuda"


def kernel_source(types: Sequence[int]) -> str:
    """The whole translation unit, specialised to the ggml types that occur."""
    cases = " ".join(f"X({number})" for number in sorted(types))
    parts = [(source_dir() / name).read_text() for name in _SOURCES]
    return "\n".join([f"#define KT_TYPES(X) {cases}", *parts])


def compile_kernels(source: str, architecture: str, cache: Path | None) -> bytes:
    """Cubin of `source` for an architecture such as sm_90a. Raises EngineError with NVRTC's log."""
    nvrtc = _load_nvrtc()
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    key = f"{architecture} {major.value}.{minor.value} {_OPTIONS}\n{source}"
    cached = (
        cache / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin" if cache else None
    )
    if cached is not None and cached.is_file():
        return cached.read_bytes()
    if cached is not None:
        log.info(
            "compiling the CUDA kernels for %s: once, then they lie in %s", architecture, cache
        )
    cubin = _compile(nvrtc, source, architecture)
    if cached is not None:
        _store(cached, cubin)
    return cubin


def _load_nvrtc() -> ctypes.CDLL:
    import torch  # noqa: F401, PLC0415 - its packages hold the library; importing sets the paths

    folders = [Path(p) for p in __import__("nvidia").__path__] if _has_nvidia() else []
    for folder in folders:
        for pattern in ("cu*/lib", "cuda_nvrtc/lib"):
            for lib in folder.glob(pattern):
                for builtins in sorted(lib.glob("libnvrtc-builtins.so.*")):
                    ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
                for found in sorted(lib.glob("libnvrtc.so.*")):
                    return ctypes.CDLL(str(found))
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise EngineError("NVRTC was not found: PyTorch's CUDA packages are incomplete")


def _has_nvidia() -> bool:
    try:
        __import__("nvidia")
    except ImportError:
        return False
    return True


def _compile(nvrtc: ctypes.CDLL, source: str, architecture: str) -> bytes:
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kt_kernels.cu", 0, None, None
    )
    options = [f"--gpu-architecture={architecture}", *_OPTIONS]
    array = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    status = nvrtc.nvrtcCompileProgram(program, len(options), array)
    if status != 0:
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, text)
        raise EngineError(f"the CUDA kernels do not compile: {text.value.decode()[:2000]}")
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


def _store(path: Path, content: bytes) -> None:
    """Atomically; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)
    except OSError:
        return


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute with an integer value."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


class Kernels:
    """A loaded module; `launch` puts a kernel on a stream. [engine]

    overlaps: kernels start while their predecessor ends (programmatic dependent launch, see
    wait_for_previous in base.cu); on by itself where the GPU can.
    """

    def __init__(self, cubin: bytes) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        # One for all launches, a prompt's layer makes thirty: to make them anew takes as long as the
        # driver's part.
        self._attribute = _LaunchAttribute(_PROGRAMMATIC_SERIALIZATION, b"", 1)
        self._config = _LaunchConfig(
            grid_z=1, block_y=1, block_z=1, attributes=ctypes.pointer(self._attribute)
        )
        self._module = ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(self._module), cubin), "load")
        self._load_functions()
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._allowed: dict[str, int] = {}  # kernel -> bytes of shared memory asked for
        self.overlaps = self._compute_capability() >= _FIRST_WITH_DEPENDENT_LAUNCH

    def _load_functions(self) -> None:
        """Load all functions now: a launch that has to load its own may wait for an idle GPU."""
        names = ("cuModuleGetFunctionCount", "cuModuleEnumerateFunctions", "cuFuncLoad")
        if not all(hasattr(self._driver, name) for name in names):
            return  # a driver before CUDA 12.4
        count = ctypes.c_uint()
        status = self._driver.cuModuleGetFunctionCount(ctypes.byref(count), self._module)
        self._check(status, "count")
        functions = (ctypes.c_void_p * count.value)()
        status = self._driver.cuModuleEnumerateFunctions(functions, count, self._module)
        self._check(status, "list")
        for function in functions:
            self._check(self._driver.cuFuncLoad(ctypes.c_void_p(function)), "load")

    def _compute_capability(self) -> int:
        """Major number of the current context's device."""
        device, major = ctypes.c_int(), ctypes.c_int()
        self._check(self._driver.cuCtxGetDevice(ctypes.byref(device)), "device")
        status = self._driver.cuDeviceGetAttribute(
            ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device
        )
        self._check(status, "device")
        return major.value

    def launch(
        self,
        name: str,
        grid: tuple[int, int],
        block: int,
        stream: int,
        arguments: Sequence[KernelArgument],
        shared_bytes: int = 0,
    ) -> None:
        """arguments: ctypes values or structures in the kernel's order. Nothing for an empty grid."""
        if 0 in grid:
            return
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        config = self._config
        config.grid_x, config.grid_y = grid
        config.block_x, config.shared_bytes, config.stream = block, shared_bytes, stream
        config.num_attributes = int(self.overlaps)
        function = self._function(name)
        if shared_bytes > _SHARED_WITHOUT_ASKING and shared_bytes > self._allowed.get(name, 0):
            status = self._driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes)
            self._check(status, name)
            self._allowed[name] = shared_bytes
        status = self._driver.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None)
        self._check(status, name)

    def _function(self, name: str) -> ctypes.c_void_p:
        function = self._functions.get(name)
        if function is None:
            function = ctypes.c_void_p()
            status = self._driver.cuModuleGetFunction(
                ctypes.byref(function), self._module, name.encode()
            )
            self._check(status, name)
            self._functions[name] = function
        return function

    def _check(self, status: int, what: str) -> None:
        if status != 0:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            reason = text.value.decode() if text.value else str(status)
            raise EngineError(f"CUDA kernel {what}: {reason}")
