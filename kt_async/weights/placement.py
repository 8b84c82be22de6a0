"""Decide for every module where it lives: rule file or derived, then fitted to the machine.

Pure apart from reading the rule file; called at start-up and by --plan, before any weight is
loaded. The first rule that matches a module wins; a rule with `recursive: False` also decides for
everything below its module.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kt_async.errors import ConfigError
from kt_async.weights.modules import Module, list_modules
from kt_async.weights.rules import Rule, find_rules, load_rules

if TYPE_CHECKING:
    from kt_async.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Placed:
    """One module and where it runs. rule: number in the file, 0 when no rule matched."""

    module: Module
    device: str  # cpu, cuda:N
    operator: str  # the module's kind: which of our operators runs it
    backend: str  # native (CPU kernels) or cuda
    rule: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """All modules in tree order. warnings: one line each; notes: details for --plan."""

    modules: tuple[Placed, ...]
    source: str  # rule file or "derived"
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def tensor_devices(self) -> dict[str, str]:
        """GGUF tensor name -> where it lives; a tensor of no module belongs on the CPU."""
        return {name: placed.device for placed in self.modules for name in placed.module.tensors}


def place(
    spec: ModelSpec,
    *,
    rules_path: str = "",
    device: str = "cpu",
    num_gpus: int = 0,
    amx: bool = True,
) -> Placement:
    """The placement of every module.

    rules_path: as given to --optimize_config_path, "" = derived: routed experts and embedding on
    the CPU, everything else on `device`. num_gpus: usable GPUs; without one all is on the CPU.
    Raises ConfigError: unreadable file, unknown name, or a rule whose name matches no module.
    """
    modules = list_modules(spec)
    if not rules_path:
        placed = [Placed(module, _derived(module, device), module.kind, "") for module in modules]
        return _fit(placed, "derived", num_gpus, [], [])
    path = find_rules(rules_path)
    rules = load_rules(path)
    notes = _check_matches(rules, modules, spec, str(path))
    placed = _apply(rules, modules, str(path))
    warnings = []
    backends = {rule.backend for rule in rules if rule.backend in ("AMXInt8", "AMXBF16")}
    if backends and not amx:
        warnings.append(
            f"{path.name} asks for {' and '.join(sorted(map(str, backends)))}, which this CPU lacks; the "
            "best instruction set it has is used."
        )
    if "AMXInt8" in backends:
        notes.append("AMXInt8: weights keep the type of the model file, nothing is re-quantised")
    return _fit(placed, str(path), num_gpus, warnings, notes)


def _derived(module: Module, device: str) -> str:
    return "cpu" if module.kind in {"experts", "embedding"} else device


def _fits(rule: Rule, module: Module) -> bool:
    if rule.name is not None and not rule.name.search(module.name):
        return False
    return rule.match_kind is None or rule.match_kind == module.kind


def _check_matches(
    rules: Sequence[Rule], modules: Sequence[Module], spec: ModelSpec, path: str
) -> list[str]:
    """A name that matches no module is a mistake; a class this model lacks is only noted."""
    errors, notes = [], []
    for rule in rules:
        if rule.name is not None and not any(rule.name.search(m.name) for m in modules):
            errors.append(
                f"{path}: {rule.describe()} matches no module of this {spec.architecture} model "
                f"with {spec.num_layers} layers{_nearest_module(rule.name.pattern, modules)}"
            )
        elif not any(_fits(rule, module) for module in modules):
            notes.append(f"{rule.describe()} has nothing to do: the model has no such module")
    if errors:
        raise ConfigError("\n".join(errors))
    return notes


def _nearest_module(pattern: str, modules: Sequence[Module]) -> str:
    plain = pattern.replace("\\", "").strip("^$")
    close = difflib.get_close_matches(plain, [m.name for m in modules], n=1, cutoff=0.5)
    return f"; the nearest module is {close[0]}." if close else "."


def _apply(rules: Sequence[Rule], modules: Sequence[Module], path: str) -> list[Placed]:
    placed: list[Placed] = []
    covers: list[tuple[str, Rule]] = []  # subtrees decided by a non-recursive rule
    for module in modules:
        rule = next((r for prefix, r in covers if module.name.startswith(prefix)), None)
        inherited = rule is not None
        if rule is None:
            rule = next((r for r in rules if _fits(r, module)), None)
        if rule is None:
            placed.append(Placed(module, "cuda:0", module.kind, ""))
            continue
        if not inherited:
            _check_operator(rule, module, path)
            if not rule.recursive:
                covers.append((f"{module.name}.", rule))
        placed.append(Placed(module, rule.device or "cuda:0", module.kind, "", rule.number))
    return placed


def _check_operator(rule: Rule, module: Module, path: str) -> None:
    same = rule.operator in ("default", module.kind)
    if not same and not (rule.operator == "gate" and module.name.endswith(".gate")):
        raise ConfigError(
            f"{path}: {rule.describe()} puts the operator for {rule.operator} on {module.name}, "
            f"which is {module.kind}."
        )


def _fit(
    placed: Sequence[Placed], source: str, num_gpus: int, warnings: list[str], notes: list[str]
) -> Placement:
    """Map devices to those the machine has."""
    wanted = {p.device if ":" in p.device else f"{p.device}:0" for p in placed if p.device != "cpu"}
    missing = sorted(name for name in wanted if int(name.partition(":")[2]) >= num_gpus)
    if wanted and num_gpus == 0:
        warnings.append("The rules use a GPU and none is used here: everything runs on the CPU.")
    elif missing:
        warnings.append(
            f"The rules use {', '.join(missing)}, but there are only {num_gpus} usable GPUs: "
            "cuda:0 takes their modules."
        )
    fitted = []
    for item in placed:
        device = item.device
        if device != "cpu":
            index = int(device.partition(":")[2] or 0)
            device = "cpu" if num_gpus == 0 else f"cuda:{index if index < num_gpus else 0}"
        backend = "native" if device == "cpu" else "cuda"
        fitted.append(Placed(item.module, device, item.operator, backend, item.rule))
    return Placement(tuple(fitted), source, tuple(warnings), tuple(notes))
