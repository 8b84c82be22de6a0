"""The one table of settings.

`Config` is frozen. `cli.parse` makes it from flags, environment, file and defaults;
`resolve.resolve` is called once the model file's header and the machine are known and returns the
final Config, in which nothing is left to be chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, get_type_hints

from kt_async.options import Option, flag, option_of, show

GROUPS: Final[Mapping[str, str]] = {
    "model": "What is served",
    "server": "HTTP server",
    "scheduling": "Scheduling and KV cache",
    "sampling": "Defaults of requests",
    "placement": "Where the model runs",
    "logging": "Logging",
    "commands": "Settings file; show something and exit",
}
# Hugging Face class name (--architectures) -> the name GGUF files carry.
ARCHITECTURES: Final[Mapping[str, str]] = {
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "DeepseekV2ForCausalLM": "deepseek2",
    "DeepseekV3ForCausalLM": "deepseek2",
}
LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})


@dataclass(frozen=True, slots=True)
class Config:
    """Every setting. A field with an Option is a flag; the last ones are bookkeeping."""

    # -- model
    gguf_path: str = flag(
        "",
        "model",
        "model file, first part of a split model, or folder with *.gguf; may also be given as "
        "the only positional argument",
        metavar="PATH",
        auto="demo model",
    )
    model_path: str = flag(
        "",
        "model",
        "folder with config.json and tokenizer that override what the GGUF carries; no weights "
        "needed there",
        metavar="DIR",
        aliases=("model_dir",),
        auto="read from the GGUF",
    )
    demo: bool = flag(
        False, "model", "serve the built-in demo model (so does giving no model at all)"
    )
    load_format: str = flag(
        "auto",
        "model",
        "dummy: fill the model's shape with random weights in memory, to time a model without its "
        "file; needs a GGUF's header, or --model_path alone (then as Q4_K_M)",
        choices=("auto", "dummy"),
    )
    architectures: str = flag(
        "",
        "model",
        "class name the model must have; refused when the file holds another architecture",
        choices=tuple(ARCHITECTURES),
        auto="read from the GGUF",
    )
    model_name: str = flag(
        "",
        "model",
        "name shown in /v1/models and answers",
        auto="the model's own name",
        published="was one fixed name whatever was loaded",
    )
    chat_template: str = flag(
        "",
        "model",
        "file with a Jinja chat template that replaces the model's",
        metavar="FILE",
        auto="the model's own",
    )
    # -- server
    host: str = flag(
        "127.0.0.1",
        "server",
        "address to listen on; 0.0.0.0 lets other machines in, then set --api_key",
        published="0.0.0.0: reachable from the network without a key",
    )
    port: int = flag(10002, "server", "TCP port; 0 picks a free one", low=0, high=65535)
    api_key: str = flag(
        "", "server", "key clients must send as `Authorization: Bearer KEY`", auto="no key"
    )
    ssl_keyfile: str = flag("", "server", "TLS private key (PEM)", metavar="FILE", auto="no TLS")
    ssl_certfile: str = flag("", "server", "TLS certificate (PEM)", metavar="FILE", auto="no TLS")
    cors_origins: tuple[str, ...] = flag(
        ("http://localhost:*", "http://127.0.0.1:*"),
        "server",
        "web origins whose pages may call the API: comma-separated, :* stands for any port; * lets "
        "every web page in",
        metavar="LIST",
        published="*",
    )
    strict_model: bool = flag(
        False, "server", "answer 404 to a request that names another model than --model_name"
    )
    shutdown_timeout_s: float = flag(
        30.0,
        "server",
        "how long running requests may go on after SIGTERM",
        unit="seconds",
        low=0,
        high=86400,
    )
    on_engine_failure: str = flag(
        "restart",
        "server",
        "after a failure that ends the engine: load the model again (at most 3 times in 10 "
        "minutes), or end with exit code 1; /health answers 503 meanwhile",
        choices=("restart", "exit"),
    )
    # -- scheduling
    backend_type: str = flag(
        "balance_serve",
        "scheduling",
        "balance_serve: many requests at once; ktransformers: the same engine, one at a time",
        choices=("balance_serve", "ktransformers"),
        published="ktransformers: served one request at a time",
    )
    max_batch_size: int = flag(
        4,
        "scheduling",
        "most requests computed in one step; more wait in the queue",
        unit="requests",
        low=1,
        high=256,
    )
    chunk_size: int = flag(
        256,
        "scheduling",
        "most tokens (prompt pieces and new ones) computed in one step; with a GPU 8192, or 4096 or 2048 on smaller ones, when not given",
        unit="tokens",
        low=1,
        high=16384,
    )
    cache_lens: int = flag(
        0,
        "scheduling",
        "size of the KV cache that all requests share; pages are taken as they are needed",
        unit="tokens",
        low=16,
        high=2**31 - 1,
        auto="max_batch_size x max_model_len, at most 131072 and half of the free memory",
        published="8192",
    )
    max_new_tokens: int = flag(
        0,
        "scheduling",
        "most tokens generated for one request, whatever it asks for",
        unit="tokens",
        low=1,
        high=2**31 - 1,
        auto="what fits into max_model_len",
        published="500: cut answers of today's clients short",
    )
    max_model_len: int = flag(
        0,
        "scheduling",
        "most tokens of prompt and answer together",
        unit="tokens",
        low=16,
        high=2**31 - 1,
        auto="the model's context, at most cache_lens",
    )
    page_size: int = flag(
        32,
        "scheduling",
        "tokens per KV page; prefixes are shared in whole pages",
        unit="tokens",
        low=16,
        high=1024,
        multiple_of=16,
        published="256: shares prefixes in coarse steps only",
    )
    sched_strategy: str = flag(
        "FCFS",
        "scheduling",
        "FCFS: several prompts may be prefilled in one step; FCFS-single-prefill: one at a time",
        choices=("FCFS", "FCFS-single-prefill"),
    )
    prefix_cache: bool = flag(
        True, "scheduling", "keep finished requests' pages for prompts that begin alike"
    )
    kv_dtype: str = flag(
        "auto",
        "scheduling",
        "number format of the KV cache; fp8 (e4m3) on a GPU only, f32 and f16 on the CPU only",
        choices=("auto", "f32", "f16", "bf16", "fp8"),
        aliases=("kv_cache_dtype",),
        auto="f32 for an F32 model on the CPU, else f16 (CPU) or bf16 (GPU)",
    )
    max_queue: int = flag(
        256,
        "scheduling",
        "requests that may wait; the next one is answered 429",
        unit="requests",
        low=0,
        high=1_000_000,
    )
    queue_timeout_s: float = flag(
        600.0,
        "scheduling",
        "a request that waited this long ends with an error; 0 = never",
        unit="seconds",
        low=0,
        high=1e6,
    )
    target_itl_ms: float = flag(
        0.0,
        "scheduling",
        "shrink prompt pieces so that running answers get a token at least this often; 0 = off",
        unit="ms",
        low=0,
        high=1e6,
    )
    # -- sampling
    temperature: float = flag(
        0.95,
        "sampling",
        "for requests without one; the model's own recommendation wins over the default",
        low=0,
        high=2,
    )
    top_p: float = flag(
        0.8,
        "sampling",
        "for requests without one; the model's own recommendation wins over the default",
        low=0,
        high=1,
    )
    top_k: int = flag(
        0,
        "sampling",
        "for requests without one (0 = off); the model's own recommendation wins over the default",
        low=0,
        high=2**31 - 1,
    )
    force_think: bool = flag(False, "sampling", "start every answer with the reasoning tag <think>")
    # -- placement
    device: str = flag(
        "auto",
        "placement",
        "cpu, cuda or cuda:N for what is not a routed expert",
        auto="cuda when there is a usable GPU",
        published="cuda:0",
    )
    optimize_config_path: str = flag(
        "",
        "placement",
        "rule file in KTransformers' syntax; a path that does not exist resolves by its name to "
        "the file in rules/",
        metavar="FILE",
        auto="derived from model and memory",
    )
    gpu_memory_utilization: float = flag(
        0.9,
        "placement",
        "share of the GPU's memory that may be in use, other programs' part included",
        low=0.05,
        high=1,
    )
    gpu_expert_mem: str = flag(
        "auto",
        "placement",
        "GPU memory for routed experts, in whole layers; the others' stay on the CPU; 0 = none; a "
        "rule file decides instead",
        unit="GB",
        choices=("auto", "all"),
        metavar="auto|all|GB",
        low=0,
        high=1e6,
        auto="as many layers as fit",
    )
    cpu_infer: int = flag(
        0,
        "placement",
        "threads of the CPU kernels, pinned one per core",
        unit="threads",
        low=1,
        high=4096,
        auto="physical cores this process may use",
        published="physical cores - 3",
    )
    pin: bool = flag(True, "placement", "pin CPU threads to cores")
    isa: str = flag(
        "auto",
        "placement",
        "instruction set of the CPU kernels, for tests",
        choices=("auto", "scalar", "avx2", "avx512", "avx512vnni", "amx"),
        auto="the best this CPU has",
    )
    cpu_memory_size_GB: float = flag(  # noqa: N815 - the published name
        0.0,
        "placement",
        "RAM for KV pages: with a GPU, the tier that evicted pages move to; else the whole cache",
        unit="GB",
        low=0,
        high=1e6,
        auto="with a GPU from the free memory, at most 16; else see cache_lens",
        published="500, taken whether there or not",
    )
    use_cuda_graph: bool = flag(
        True, "placement", "replay decode steps as CUDA graphs (nothing changes on the CPU)"
    )
    # -- logging
    log_level: str = flag(
        "info",
        "logging",
        "least severity that is written",
        choices=("debug", "info", "warning", "error"),
        published="debug",
    )
    log_file: str = flag(
        "", "logging", "write the log to this file", metavar="FILE", auto="standard error"
    )
    log_dir: str = flag(
        "",
        "logging",
        "folder of --log_file; alone, the file is kt_async.log",
        metavar="DIR",
        auto="none",
    )
    log_json: bool = flag(False, "logging", "one JSON object per log line")
    # -- commands and where settings come from
    config: str = flag(
        "", "commands", "YAML file with settings (keys are flag names)", metavar="FILE", auto="none"
    )
    print_config: bool = flag(
        False, "commands", "print every setting and where it comes from", is_command=True
    )
    plan: bool = flag(
        False, "commands", "print the placement, bytes and speed bound", is_command=True
    )
    selfcheck: bool = flag(
        False, "commands", "check this installation, print PASSED or FAILED", is_command=True
    )
    cpu_info: bool = flag(
        False, "commands", "print what the native library sees of this machine", is_command=True
    )
    # -- bookkeeping, no flags
    sources: Mapping[str, str] = field(default_factory=dict)  # name -> flag, env X, file X
    reasons: Mapping[str, str] = field(default_factory=dict)  # name -> why the derived value
    warnings: tuple[str, ...] = ()  # one line each, to be logged at start
    vram_layers: tuple[int, ...] = ()  # layers whose routed experts lie in VRAM; set by resolve

    @property
    def command(self) -> str:
        """print_config, plan, selfcheck, cpu_info, or serve."""
        for name, _, option in options():
            if option.is_command and getattr(self, name):
                return name
        return "serve"

    @property
    def num_pages(self) -> int:
        """KV pages of a resolved Config."""
        return self.cache_lens // self.page_size

    def public(self) -> dict[str, Any]:
        """All settings without secrets, for /health and logs."""
        values = {name: getattr(self, name) for name, _, opt in options() if not opt.is_command}
        values["api_key"] = "set" if self.api_key else ""
        return values


def options() -> list[tuple[str, type, Option]]:
    """(name, type, Option) of every flag in table order; list-valued flags have type tuple."""
    hints = get_type_hints(Config)
    found = []
    for item in dataclasses.fields(Config):
        option = option_of(item)
        if option is not None:
            kind = hints[item.name]
            found.append((item.name, tuple if kind == tuple[str, ...] else kind, option))
    return found


def default_of(name: str) -> object:
    """The default of one flag."""
    return next(item.default for item in dataclasses.fields(Config) if item.name == name)


def describe(config: Config) -> list[tuple[str, str, str]]:
    """(name, value, source) of every flag, secrets hidden, for --print-config."""
    rows = []
    for name, _, option in options():
        value = show(getattr(config, name))
        source = config.sources.get(name, "default")
        if name in config.reasons:
            source = f"derived: {config.reasons[name]}"
        elif source == "default" and option.auto and getattr(config, name) == default_of(name):
            value, source = "auto" if value == "0" else value, f"default: {option.auto}"
        if name == "api_key" and value:
            value = "***"
        rows.append((name, value or "-", source))
    return rows
