"""Read a rule file in KTransformers' syntax and translate its names into ours.

    - match: {name: <regular expression on the dotted module name>, class: <class of the module>}
      replace: {class: <operator or "default">, kwargs: {generate_device: cpu|cuda|cuda:N, ...}}
      recursive: true

`load_rules` checks everything that can be checked without a model; `placement` applies the rules.
Files are untrusted: safe YAML only, and every unknown key, class or operator is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import yaml

from kt_async.errors import ConfigError
from kt_async.options import hint

# Class of a module in a checkpoint's Hugging Face code (last dotted part) -> module kind.
MATCH_CLASSES: Final[Mapping[str, str]] = {
    "Linear": "linear",
    "Embedding": "embedding",
    "ModuleList": "experts",
    "MoEGate": "gate",
    "DeepseekV2MoE": "moe",
    "DeepseekV3MoE": "moe",
    "Qwen2MoeSparseMoeBlock": "moe",
    "Qwen3MoeSparseMoeBlock": "moe",
    "DeepseekV2YarnRotaryEmbedding": "rope",
    "DeepseekV3YarnRotaryEmbedding": "rope",
} | {
    f"{family}{part}": kind
    for family in ("DeepseekV2", "DeepseekV3", "Qwen2Moe", "Qwen3Moe")
    for part, kind in (
        ("RMSNorm", "rms_norm"),
        ("MLP", "mlp"),
        ("Attention", "attention"),
        ("FlashAttention2", "attention"),
        ("SdpaAttention", "attention"),
        ("RotaryEmbedding", "rope"),
        ("DecoderLayer", "layer"),
        ("Model", "model"),
    )
}
# KTransformers' operator classes (last dotted part) -> the module kind ours serves.
REPLACE_CLASSES: Final[Mapping[str, str]] = {
    "default": "default",
    "KTransformersLinear": "linear",
    "KTransformerLinear": "linear",
    "KTransformersExperts": "experts",
    "KTransformersExpertsV2": "experts",
    "KTransformersMLPExpert": "experts",
    "KDeepseekV2MoE": "moe",
    "KDeepseekV3MoE": "moe",
    "KDeepseekV3MoEV2": "moe",
    "DeepseekV2MoEInjected": "moe",
    "KQwen2MoeSparseMoeBlock": "moe",
    "KQwen2MoeSparseMoeBlockV2": "moe",
    "KQwen3MoeSparseMoeBlock": "moe",
    "KQwen3MoeSparseMoeBlockV2": "moe",
    "Qwen2MoeSparseMoeBlockInjected": "moe",
    "KMoEGate": "gate",
    "KMoEGateDeepSeekV3": "gate",
    "KMoEGateQwen2Moe": "gate",
    "KMoEGateIPEXLLM": "gate",
    "flashinfer_attn": "attention",
    "KDeepseekV2Attention": "attention",
    "DeepseekV2AttentionInjected": "attention",
    "KQwen2MoeAttention": "attention",
    "KQwen3MoeAttention": "attention",
    "KQwen3MoeAttentionIPEXLLM": "attention",
    "RotaryEmbedding": "rope",
    "RotaryEmbeddingV2": "rope",
    "RotaryEmbeddingV3": "rope",
    "RotaryEmbeddingV4": "rope",
    "YarnRotaryEmbedding": "rope",
    "YarnRotaryEmbeddingV2": "rope",
    "YarnRotaryEmbeddingV3": "rope",
    "YarnRotaryEmbeddingV4": "rope",
    "RMSNorm": "rms_norm",
    "KQwen2MoeRMSNorm": "rms_norm",
    "KQwen3MoeRMSNorm": "rms_norm",
    "KDeepseekRMSNormIPEXLLM": "rms_norm",
    "kDeepseekV3MLP": "mlp",
    "KQwen2MoeMLP": "mlp",
    "KDeepseekV2Model": "model",
    "KQwen2MoeModel": "model",
    "KQwen3MoeModel": "model",
    "DeepseekV2ModelPerLayerPrefill": "model",
}
# generate_op / prefill_op -> the place whose kernels it names. Weights keep the type they have in
# the model file whatever the operator was called: nothing is quantised again.
OPERATORS: Final[Mapping[str, Mapping[str, str]]] = {
    "linear": {
        "VLinearMarlin": "cuda",
        "KLinearMarlin": "cuda",
        "KLinearTorch": "cuda",
        "KLinearFP8": "cuda",
        "KLinearQ8": "cuda",
        "KLinearIPEXLLM": "cuda",
        "KLinearCPUInfer": "cpu",
        "QuantizedLinearMarlin": "cuda",
        "QuantizedLinearTorch": "cuda",
    },
    "experts": {
        "KExpertsCPU": "cpu",
        "KExpertsTorch": "cuda",
        "KExpertsMarlin": "cuda",
        "MLPCPUExperts": "cpu",
        "MLPExpertsTorch": "cuda",
        "MLPExpertsMarlin": "cuda",
    },
}
BACKENDS: Final = ("llamafile", "AMXInt8", "AMXBF16")
_OPERATOR_KEYS: Final = ("generate_op", "prefill_op", "generate_mlp_type", "prefill_mlp_type")
_DEVICE_KEYS: Final = ("generate_device", "prefill_device", "out_device")
# Understood, without an effect of their own: absorption and layer-wise prefill are chosen by the
# engine, num_bits by the model file, transfer_map by the devices of the layers.
_QUIET_KEYS: Final = (
    "absorb_for_prefill",
    "num_bits",
    "per_layer_prefill_intput_threshold",
    "transfer_map",
)
_KWARGS: Final = (*_OPERATOR_KEYS, *_DEVICE_KEYS, *_QUIET_KEYS, "backend")
_MAX_FILE: Final = 1 << 20
_SHOWN: Final = 60  # characters of a pattern in messages


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of a rule file; `operator` and `match_kind` are our module kinds."""

    number: int  # position in the file, from 1
    name: re.Pattern[str] | None
    match_kind: str | None
    operator: str
    device: str | None  # where the weights live and decode runs: cpu, cuda or cuda:N
    backend: str | None
    recursive: bool

    def describe(self) -> str:
        """How messages point at the rule."""
        pattern = self.name.pattern if self.name else ""
        short = pattern if len(pattern) <= _SHOWN else f"{pattern[: _SHOWN - 3]}..."
        wanted = [f"name {short}"] if pattern else []
        wanted += [f"class {self.match_kind}"] if self.match_kind else []
        return f"rule {self.number} ({', '.join(wanted)})"


def rules_folder() -> Path:
    """The rule files that come with kt_async: inside the package, or in the source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "rules"
    return installed if installed.is_dir() else package.parent / "rules"


def find_rules(path: str) -> Path:
    """The file for --optimize_config_path: the path itself, or our file of the same name.

    Raises ConfigError naming the nearest file when there is none.
    """
    given = Path(path)
    if given.is_file():
        return given
    ours = rules_folder() / PurePosixPath(path.replace("\\", "/")).name
    if ours.is_file():
        return ours
    valid = sorted(file.name for file in rules_folder().glob("*.yaml"))
    raise ConfigError(f"--optimize_config_path {path} does not exist{hint(ours.name, valid)}")


def load_rules(path: Path) -> list[Rule]:
    """Parse and check a rule file. Raises ConfigError with every problem, one per line."""
    try:
        if path.stat().st_size > _MAX_FILE:
            raise ConfigError(f"{path}: a rule file has at most {_MAX_FILE} bytes.")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, list) or not content:
        raise ConfigError(f"{path} must hold a list of rules (- match: ... replace: ...).")
    errors: list[str] = []
    rules: list[Rule] = []
    for number, entry in enumerate(content, start=1):
        try:
            rules.append(_Entry(number, entry).rule())
        except ConfigError as error:
            errors.append(f"{path}: rule {number}: {error}")
    if errors:
        raise ConfigError("\n".join(errors))
    return rules


class _Entry:
    """Checks one entry of the file, key by key."""

    def __init__(self, number: int, entry: object) -> None:
        self.number = number
        self.entry = _mapping("the rule", entry, ("match", "replace", "recursive"))
        self.match = _mapping("match", self.entry.get("match"), ("name", "class"))
        self.replace = _mapping("replace", self.entry.get("replace"), ("class", "kwargs", "device"))
        kwargs = self.replace.get("kwargs")
        self.kwargs = _mapping("kwargs", {} if kwargs is None else kwargs, _KWARGS)

    def rule(self) -> Rule:
        if not self.match:
            raise ConfigError("match needs a name or a class.")
        operator = _lookup("replace class", self.replace.get("class", "default"), REPLACE_CLASSES)
        kind = self.match.get("class")
        recursive = self.entry.get("recursive", True)
        if not isinstance(recursive, bool):
            raise ConfigError(f"recursive is {recursive!r}; valid are True and False.")
        return Rule(
            number=self.number,
            name=self._pattern(),
            match_kind=None if kind is None else _lookup("match class", kind, MATCH_CLASSES),
            operator=operator,
            device=self._device(operator),
            backend=self._backend(),
            recursive=recursive,
        )

    def _pattern(self) -> re.Pattern[str] | None:
        text = self.match.get("name")
        if text is None:
            return None
        try:
            return re.compile(str(text))
        except re.error as error:
            raise ConfigError(f"name {text!r} is no regular expression: {error}.") from error

    def _device(self, operator: str) -> str | None:
        """Where the module lives: generate_device, corrected by what generate_op can run on."""
        for key in (*_DEVICE_KEYS, "device"):
            value = self.kwargs.get(key, self.replace.get(key))
            if value is not None and not re.fullmatch(r"cpu|(cuda|xpu)(:\d+)?", str(value)):
                raise ConfigError(f"{key} is {value!r}; valid are cpu, cuda and cuda:N.")
        places = {}
        for key in _OPERATOR_KEYS:
            if key in self.kwargs:
                valid = OPERATORS.get(operator, {**OPERATORS["linear"], **OPERATORS["experts"]})
                places[key] = _lookup(key, self.kwargs[key], valid)
        device = self.kwargs.get("generate_device", self.replace.get("device"))
        place = places.get("generate_op", places.get("generate_mlp_type"))
        if place is not None and device is not None and (place == "cpu") != (device == "cpu"):
            named = self.kwargs.get("generate_op", self.kwargs.get("generate_mlp_type"))
            raise ConfigError(f"generate_op {named} does not run on generate_device {device}.")
        return str(device).replace("xpu", "cuda") if device is not None else place

    def _backend(self) -> str | None:
        value = self.kwargs.get("backend")
        if value is None or value in BACKENDS:
            return value
        raise ConfigError(
            f"backend is {value!r}; valid are {', '.join(BACKENDS)}{hint(str(value), BACKENDS)}"
        )


def _mapping(what: str, value: object, valid: Iterable[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{what} must be a mapping, not {value!r}.")
    for key in value:
        if key not in valid:
            raise ConfigError(f"{what} has the unknown key {key!r}{hint(str(key), valid)}")
    return value


def _lookup(what: str, name: object, table: Mapping[str, str]) -> str:
    last = str(name).rpartition(".")[2]
    if last in table:
        return table[last]
    raise ConfigError(f"{what} {name!r} is unknown{hint(last, table)}")
