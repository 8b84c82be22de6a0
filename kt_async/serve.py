"""Start-up and shutdown of the server: model file -> engine -> HTTP, and back.

Start-up binds the port first (a taken one must not cost a load), checks everything, then loads.
Shutdown on SIGTERM or SIGINT: refuse new requests, let running ones finish, stop the engine; a
second signal ends at once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
import socket
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from kt_async.api.app import ApiSettings, drain, make_app, make_runner
from kt_async.config import Config
from kt_async.demo import demo_model_path
from kt_async.engine.build import Model, engine_info, load_runner, make_scheduler, size_kv
from kt_async.engine.gpu_memory import chunk_for
from kt_async.engine.restart import watch
from kt_async.engine.runner import Runner
from kt_async.engine.service import EngineService
from kt_async.errors import ConfigError, EngineError
from kt_async.ffi.cuda import count_gpus
from kt_async.ffi.host import query_host
from kt_async.ffi.scheduler import Scheduler
from kt_async.model import FORWARDS
from kt_async.model.dummy import open_dummy
from kt_async.model.hf_config import load_spec
from kt_async.model.tensors import check_tensors, expected_tensors
from kt_async.resolve import HostFacts, ModelFacts, resolve
from kt_async.text.template import ChatTemplate, load_template
from kt_async.text.tokenizer import Tokenizer, load_tokenizer
from kt_async.weights.generation import recommended_sampling
from kt_async.weights.loader import check_types
from kt_async.weights.placement import place
from kt_async.weights.source import ModelFiles, open_model

log = logging.getLogger(__name__)

_LEAST_CAPABILITY = 8  # of a GPU: matrix instructions for bf16

# The engine thread and the event loop share the GIL; the default of 5 ms would let one of them
# hold up the other for whole decode steps.
_SWITCH_INTERVAL_S = 5e-4


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything known before the weights are loaded."""

    config: Config
    model: Model
    tokenizer: Tokenizer
    template: ChatTemplate


def prepare(raw: Config) -> Prepared:
    """Open the model, resolve the settings, build the text tools. Raises ConfigError."""
    model_path = Path(raw.model_path) if raw.model_path else None
    files = _open(raw, model_path)
    spec = load_spec(files, model_path)
    if spec.architecture not in FORWARDS:
        raise ConfigError(
            f"{files.path}: architecture {spec.architecture} is not served; "
            f"supported are {', '.join(sorted(FORWARDS))}"
        )
    check_tensors(spec, files)
    check_types(files, expected_tensors(spec))
    tokenizer = load_tokenizer(files, model_path)
    template_file = Path(raw.chat_template) if raw.chat_template else None
    template = load_template(files, tokenizer, model_path, template_file)
    model = Model(files, spec, sample_vocab(tokenizer, spec.vocab_size))
    host = query_host()
    facts = ModelFacts(
        name=spec.name,
        architecture=spec.architecture,
        max_context=spec.max_context,
        main_type=model.main_type,
        generation=recommended_sampling(model_path, files.metadata),
    )
    gpus = 0 if raw.device == "cpu" else usable_gpus()
    machine = HostFacts(host.num_cpus, host.num_cores)
    if gpus:
        chunk = chunk_for(spec, smallest_gpu(gpus))
        machine = dataclasses.replace(machine, num_gpus=gpus, gpu_chunk=chunk)
    placement = place(
        spec, rules_path=raw.optimize_config_path, num_gpus=gpus, amx="amx" in host.isas
    )
    raw = dataclasses.replace(raw, warnings=(*raw.warnings, *placement.warnings))
    config = resolve(raw, facts, machine, lambda config: size_kv(model, host, config))
    return Prepared(config, model, tokenizer, template)


def _open(raw: Config, model_path: Path | None) -> ModelFiles:
    """The model's files, or what stands for them with --load_format dummy."""
    path = Path(raw.gguf_path) if raw.gguf_path else None
    if raw.load_format == "dummy" and (path or model_path):
        return open_dummy(path, model_path)
    if raw.load_format == "dummy":
        return open_dummy(demo_model_path(), None)
    return open_model(path or demo_model_path())


def usable_gpus() -> int:
    """How many GPUs, from the first on, the driver, this PyTorch and our kernels can use.

    Logs a warning where the driver has more.
    """
    if count_gpus() == 0:
        return 0
    import torch  # noqa: PLC0415 - seconds to import, and only a GPU needs it

    if not torch.cuda.is_available():
        log.warning("there is a GPU, but this PyTorch build cannot use it: running on the CPU")
        return 0
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if major < _LEAST_CAPABILITY:
            name = torch.cuda.get_device_name(index)
            log.warning(
                "GPU %d (%s) has compute capability %d.%d, the kernels need %d.0 (RTX 30 or newer): "
                "it is not used, nor are GPUs after it (CUDA_VISIBLE_DEVICES chooses others)",
                *(index, name, major, minor, _LEAST_CAPABILITY),
            )
            return index
    return torch.cuda.device_count()


def smallest_gpu(gpus: int) -> int:
    """Bytes of memory of the GPU that has least."""
    import torch  # noqa: PLC0415 - seconds to import, and only a GPU needs it

    return min(torch.cuda.get_device_properties(index).total_memory for index in range(gpus))


def sample_vocab(tokenizer: Tokenizer, vocab_size: int) -> int:
    """How many leading ids may be sampled: the padding at the vocabulary's end may not."""
    end = min(tokenizer.vocab_size, vocab_size)
    unused = tokenizer.unused_ids
    while end > 1 and end - 1 in unused:
        end -= 1
    return end


def bind(config: Config) -> socket.socket:
    """Take the port before anything slow. Raises ConfigError when it is taken."""
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
    except OSError as error:
        raise ConfigError(
            f"--host {config.host} --port {config.port}: cannot listen there ({error.strerror})"
        ) from error
    return listener


def tls_context(config: Config) -> ssl.SSLContext | None:
    """TLS when a certificate is configured."""
    if not config.ssl_certfile:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"--ssl_certfile {config.ssl_certfile}: {error}") from error
    return context


def api_settings(config: Config) -> ApiSettings:
    """The HTTP layer's share of the settings."""
    return ApiSettings(
        model_name=config.model_name,
        api_keys=(config.api_key,) if config.api_key else (),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        force_think=config.force_think,
        strict_model=config.strict_model,
        cors_origins=config.cors_origins,
    )


async def serve(raw: Config) -> None:
    """Serve until a signal. Raises ConfigError before serving starts, EngineError when the engine
    has failed for good."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    tls = tls_context(raw)
    listener = bind(raw)
    ready = prepare(raw)
    config = ready.config
    for warning in config.warnings:
        log.warning("%s", warning)
    log.info("running on %s (%s)", config.device, config.reasons.get("device", "given"))
    service = EngineService(*load_engine(ready), engine_info(ready.model, config))
    app = make_app(service, ready.tokenizer, ready.template, api_settings(config))
    http = make_runner(app)
    await http.setup()
    service.start()
    await web.SockSite(http, listener, ssl_context=tls).start()
    host, port = listener.getsockname()[:2]
    scheme = "https" if tls else "http"
    log.info("ready: %s on %s://%s:%d", config.model_name, scheme, host, port)
    try:
        failure = await _serve_until_end(service, ready)
        log.info("stopping: waiting for %d requests", len(service.running()))
        if not await drain(app, config.shutdown_timeout_s):
            log.warning("requests still running after %g s were ended", config.shutdown_timeout_s)
    finally:
        await http.cleanup()
        service.close()
        ready.model.files.close()
    log.info("stopped")
    if failure is not None:
        raise failure


def load_engine(ready: Prepared) -> tuple[Scheduler, Runner]:
    """Scheduler and runner of a prepared model; takes as long as the disk needs."""
    scheduler = make_scheduler(ready.model.spec, ready.config)
    return scheduler, load_runner(ready.model, ready.config, scheduler)


async def _serve_until_end(service: EngineService, ready: Prepared) -> EngineError | None:
    """Wait for a signal, restarting a failed engine; an error when it stays failed."""
    policy = ready.config.on_engine_failure
    guard = asyncio.create_task(watch(service, policy, lambda: load_engine(ready)))
    stop = asyncio.create_task(_wait_for_signal())
    await asyncio.wait((guard, stop), return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    guard.cancel()
    (outcome,) = await asyncio.gather(guard, return_exceptions=True)
    return outcome if isinstance(outcome, EngineError) else None


async def _wait_for_signal() -> None:
    """Return at the first SIGTERM or SIGINT; the second one has its default effect."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await stop.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
