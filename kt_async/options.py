"""What a flag is: its metadata, how text becomes a value, and the nearest valid name to a wrong one.

Used by `config` (the table of flags) and `cli` (help, parsing). Pure functions, stdlib only.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kt_async.errors import ConfigError

TRUE_WORDS = frozenset({"1", "true", "yes", "on"})
FALSE_WORDS = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, slots=True)
class Option:
    """Everything about one flag except its name, type and default (the dataclass field has those).

    auto: how the value is chosen when the default means "choose"; shown instead of the default.
    low, high: range of a number; a text flag that has one may also be such a number.
    published: the default KTransformers used, when ours differs, with the reason.
    """

    group: str
    help: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    multiple_of: int = 0
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    metavar: str = ""
    auto: str = ""
    published: str = ""
    is_command: bool = False


def flag(default: object, group: str, text: str, **details: Any) -> Any:
    """Declare one field of the table; `details` are the other members of Option."""
    return dataclasses.field(
        default=default, metadata={"option": Option(group=group, help=text, **details)}
    )


def option_of(field: dataclasses.Field[Any]) -> Option | None:
    """The Option of a dataclass field, None for bookkeeping fields that are no flags."""
    found = field.metadata.get("option")
    return found if isinstance(found, Option) else None


def normalise(name: str) -> str:
    """One spelling for --max-batch-size, --max_batch_size and max-batch-size."""
    return name.lstrip("-").replace("-", "_")


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name a user most likely meant, or None when nothing is close."""
    names = sorted(valid)
    folded = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.55)
    if close:
        return folded[close[0]]
    inside = [candidate for candidate in names if len(name) > 3 and name.lower() in candidate]
    return inside[0] if inside else None


def hint(name: str, valid: Iterable[str], prefix: str = "") -> str:
    """The end of a sentence about a wrong name: "; did you mean X?", or a full stop."""
    found = nearest(name, valid)
    return f"; did you mean {prefix}{found}?" if found else "."


def show(value: object) -> str:
    """A value as a user would type it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def convert(name: str, kind: type, option: Option, raw: object) -> object:
    """Turn text (or a YAML scalar) into the flag's type and check its range.

    Raises ConfigError naming the flag, the value and what would be valid.
    """
    if raw is None:
        raise ConfigError(f"{name} has no value.")
    if kind is bool:
        return _to_bool(name, raw)
    if kind is tuple:
        items = raw if isinstance(raw, list) else show(raw).split(",")
        return tuple(str(item).strip() for item in items if str(item).strip())
    if isinstance(raw, list | dict):
        raise ConfigError(f"{name} needs a single value, not {raw!r}.")
    if kind is str:
        return _to_text(name, option, show(raw))
    return _to_number(name, kind, option, raw)


def _to_bool(name: str, raw: object) -> bool:
    word = show(raw).strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise ConfigError(f"{name} is {raw!r}; valid are true and false.")


def _to_text(name: str, option: Option, text: str) -> str:
    if not option.choices:
        return text
    folded = {choice.lower(): choice for choice in option.choices}
    if text.lower() in folded:
        return folded[text.lower()]
    valid = ", ".join(option.choices)
    if option.low is not None:
        if text[:1].isdecimal():
            return show(_to_number(name, float, dataclasses.replace(option, auto=""), text))
        valid = f"{valid} and a number{' of ' + option.unit if option.unit else ''}"
    raise ConfigError(f"{name} is {text!r}; valid are {valid}{hint(text, option.choices)}")


def _to_number(name: str, kind: type, option: Option, raw: object) -> float | int:
    unit = f" {option.unit}" if option.unit else ""
    text = show(raw).strip()
    if option.auto and text.lower() == "auto":
        return 0
    try:
        value = int(text.replace("_", "")) if kind is int else float(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(
            f"{name} is {text!r}; it must be {what}{unit and ' of' + unit}."
        ) from None
    if option.auto and value == 0:
        return value
    low, high = option.low, option.high
    too_low = low is not None and not value >= low  # written so that NaN fails too
    if too_low or (high is not None and not value <= high):
        raise ConfigError(f"{name} is {text}; it must be {_range(low, high)}{unit}.")
    if option.multiple_of and value % option.multiple_of:
        raise ConfigError(f"{name} is {text}; it must be a multiple of {option.multiple_of}.")
    return value


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high:.10g}"
    return f"at least {low:.10g}" if high is None else f"between {low:.10g} and {high:.10g}"
