"""The command line: flags, environment and file become one Config; help and listings as text.

Called by `__main__`, which prints and exits. Precedence: flag > KT_ASYNC_<FLAG> > --config FILE >
default. All problems are reported at once as one ConfigError. The only reader of the environment.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TextIO

import yaml

from kt_async import __version__
from kt_async.config import GROUPS, LOOPBACK, Config, default_of, describe, options
from kt_async.errors import ConfigError, KtError
from kt_async.options import (
    FALSE_WORDS,
    TRUE_WORDS,
    Option,
    convert,
    hint,
    normalise,
    show,
)
from kt_async.retired import OLD_DEAD_SECTIONS, OLD_KEYS, OLD_SECTIONS, RETIRED
from kt_async.weights.rules import find_rules

ENV_PREFIX: Final = "KT_ASYNC_"
_EXAMPLES: Final = """examples:
  python -m kt_async                              the built-in demo model
  python -m kt_async model.gguf --max_batch_size 8
  python -m kt_async --model_path DIR --gguf_path DIR --cache_lens 32768 --chunk_size 256
  python -m kt_async --plan model.gguf            what would go where, without loading

Flags may be written with - or _. Each can also be set as environment variable KT_ASYNC_<FLAG> or
as key of the --config file; a flag wins over the environment, that over the file."""


class Answer(Exception):  # noqa: N818 - not an error
    """The command line asked for a text (--help, --version): print it, exit with 0."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text  # complete lines


class _Collected:
    """Raw values with their sources, and everything there is to say about them."""

    def __init__(self) -> None:
        self.table: dict[str, tuple[type, Option]] = {
            name: (kind, option) for name, kind, option in options()
        }
        self.aliases = {
            alias: name for name, _, option in options() for alias in option.aliases
        } | {name: name for name in self.table}
        self.folded = {name.lower(): canonical for name, canonical in self.aliases.items()}
        self.values: dict[str, object] = {}
        self.sources: dict[str, str] = {}
        self.warnings: list[str] = []
        self.errors: list[str] = []

    def canonical(self, name: str) -> str | None:
        """The flag's own name for any accepted spelling, None when there is none."""
        return self.folded.get(normalise(name).lower())

    def known(self) -> list[str]:
        return sorted([*self.aliases, "help", "version"])

    def put(self, name: str, raw: object, label: str, source: str) -> None:
        """Convert and keep one value unless a stronger source has set it already."""
        if name in self.sources:
            return
        kind, option = self.table[name]
        try:
            value = convert(label, kind, option, raw)
        except ConfigError as error:
            self.errors.append(str(error))
            value = default_of(name)
        self.values[name] = value
        self.sources[name] = source

    def retired(self, label: str, name: str) -> None:
        self.warnings.append(f"{label} is ignored: {RETIRED[name]}.")


def parse(argv: Sequence[str], env: Mapping[str, str]) -> Config:
    """Build the Config from argv (without the program's name) and the environment.

    Raises Answer for --help and --version, ConfigError (every problem, one per line) otherwise.
    """
    found = _Collected()
    _scan_flags(found, list(argv))
    _scan_env(found, env)
    path = found.values.get("config")
    if path:
        _scan_file(found, Path(str(path)))
    return _finish(found)


def _scan_flags(found: _Collected, argv: list[str]) -> None:
    """Read argv left to right; a flag given twice counts with its last value."""
    given: dict[str, tuple[object, str]] = {}
    rest: list[str] = []
    while argv:
        word = argv.pop(0)
        if word in {"-h", "--help"}:
            raise Answer(help_text())
        if word in {"-V", "--version"}:
            raise Answer(f"kt_async {__version__}\n")
        if word == "--":
            rest += argv
            break
        if word.startswith("-") and len(word) > 1:
            _flag(found, word, argv, given)
        else:
            rest.append(word)
    if rest:
        if len(rest) > 1:
            found.errors.append(f"Only one model can be given, not {len(rest)}: {' '.join(rest)}.")
        if "gguf_path" in given and given["gguf_path"][0] != rest[0]:
            found.errors.append(
                f"The model is given twice: {rest[0]} and --gguf_path {given['gguf_path'][0]}."
            )
        given["gguf_path"] = (rest[0], "MODEL")
    for name, (raw, label) in given.items():
        found.put(name, raw, label, "flag")


def _flag(
    found: _Collected, token: str, argv: list[str], given: dict[str, tuple[object, str]]
) -> None:
    """Handle one flag; takes its value off argv."""
    label, equals, text = token.partition("=")
    bare = normalise(label)
    negated = bare.lower().startswith("no_") and bare.lower() not in RETIRED
    name = found.canonical(bare[3:] if negated else bare) if token.startswith("--") else None
    if name is None and bare.lower() in RETIRED:
        if not equals and argv and not argv[0].startswith("-"):
            argv.pop(0)
        found.retired(label, bare.lower())
        return
    is_bool = name is not None and found.table[name][0] is bool
    if name is None or (negated and not is_bool):
        found.errors.append(f"Unknown flag {label}{hint(bare, found.known(), '--')}")
        if not equals and argv and not argv[0].startswith("-"):
            argv.pop(0)  # most likely its value: not a model
        return
    if is_bool:
        given[name] = (_bool_text(argv, equals, text, negated), label)
    elif equals:
        given[name] = (text, label)
    elif argv and not argv[0].startswith("--"):
        given[name] = (argv.pop(0), label)
    else:
        found.errors.append(f"{label} needs a value.")


def _bool_text(argv: list[str], equals: str, text: str, negated: bool) -> str:
    """The word a switch stands for: --x, --no-x, --x=false and --x False all work."""
    if not equals and argv and argv[0].lower() in TRUE_WORDS | FALSE_WORDS:
        text, equals = argv.pop(0), "="
    if not equals:
        return "false" if negated else "true"
    if negated and text.lower() in TRUE_WORDS | FALSE_WORDS:
        return "false" if text.lower() in TRUE_WORDS else "true"
    return text


def _scan_env(found: _Collected, env: Mapping[str, str]) -> None:
    for variable in sorted(env):
        if not variable.startswith(ENV_PREFIX):
            continue
        bare = variable.removeprefix(ENV_PREFIX).lower()
        name = found.canonical(bare)
        if name is not None:
            found.put(name, env[variable], variable, f"env {variable}")
        elif bare in RETIRED:
            found.retired(variable, bare)
        else:
            valid = [ENV_PREFIX + alias.upper() for alias in found.aliases]
            found.errors.append(f"Unknown environment variable {variable}{hint(variable, valid)}")


def _scan_file(found: _Collected, path: Path) -> None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        found.errors.append(f"--config {path} cannot be read: {error.strerror or error}.")
        return
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = " ".join(str(error).split())
        found.errors.append(f"--config {path} is not valid YAML: {first}.")
        return
    if content is None:
        return
    if not isinstance(content, dict):
        found.errors.append(f"--config {path} must hold `flag: value` lines.")
        return
    for key, raw in _flatten(found, content, path):
        _file_key(found, key, raw, path)


def _flatten(found: _Collected, content: Mapping[Any, Any], path: Path) -> list[tuple[str, object]]:
    """(key, value) pairs; the sections of KTransformers' config.yaml are opened."""
    pairs: list[tuple[str, object]] = []
    for key, raw in content.items():
        section = str(key)
        if section in OLD_DEAD_SECTIONS:
            found.warnings.append(f"{path}: {section} is ignored: {OLD_DEAD_SECTIONS[section]}.")
        elif isinstance(raw, dict) and section in OLD_SECTIONS:
            pairs += [
                (OLD_KEYS.get(f"{section}.{inner}", str(inner)), value)
                for inner, value in raw.items()
            ]
        else:
            pairs.append((section, raw))
    return pairs


def _file_key(found: _Collected, key: str, raw: object, path: Path) -> None:
    name = found.canonical(key)
    if name is not None and not found.table[name][1].is_command and name != "config":
        if raw is not None:
            found.put(name, raw, f"{path}: {key}", f"file {path}")
    elif normalise(key).lower() in RETIRED:
        found.retired(f"{path}: {key}", normalise(key).lower())
    else:
        found.errors.append(f"{path}: unknown key {key}{hint(normalise(key), found.aliases)}")


def _finish(found: _Collected) -> Config:
    """Relations between settings and files that must exist; then the Config."""
    config = Config(**found.values, sources=found.sources)  # type: ignore[arg-type]
    changes: dict[str, object] = {}
    if not config.gguf_path and config.model_path and _holds_gguf(config.model_path):
        changes["gguf_path"] = config.model_path
        found.sources["gguf_path"] = "model_path holds *.gguf"
    elif not config.gguf_path and not config.model_path and not config.demo:
        changes["demo"] = True
        found.sources["demo"] = "no model given"
    if config.log_dir and not config.log_file:
        changes["log_file"] = str(Path(config.log_dir) / "kt_async.log")
    elif config.log_dir:
        changes["log_file"] = str(Path(config.log_dir) / config.log_file)
    found.values.update(changes)
    config = Config(**found.values, sources=found.sources)  # type: ignore[arg-type]
    _check(found, config)
    if found.errors:
        raise ConfigError("\n".join(found.errors))
    found.values["warnings"] = tuple(found.warnings)
    return Config(**found.values, sources=found.sources)  # type: ignore[arg-type]


def _holds_gguf(folder: str) -> bool:
    path = Path(folder)
    return path.is_dir() and any(path.glob("*.gguf"))


def _check(found: _Collected, config: Config) -> None:
    errors = found.errors
    if config.demo and config.gguf_path:
        errors.append(f"--demo and a model ({config.gguf_path}) exclude each other.")
    is_dummy = config.load_format == "dummy"
    if config.model_path and not config.gguf_path and not config.demo and not is_dummy:
        errors.append(
            f"--model_path {config.model_path} names configuration and tokenizer only; "
            "--gguf_path with the weights is missing."
        )
    for name in ("gguf_path", "model_path", "chat_template", "ssl_keyfile", "ssl_certfile"):
        value = getattr(config, name)
        if value and not Path(value).exists():
            local = "; it must be a local folder" if name == "model_path" else ""
            errors.append(f"--{name} {value} does not exist{local}.")
    if config.model_path and Path(config.model_path).is_file():
        errors.append(f"--model_path {config.model_path} is a file; it must be a folder.")
    if bool(config.ssl_keyfile) != bool(config.ssl_certfile):
        errors.append("--ssl_keyfile and --ssl_certfile are needed together.")
    if config.chunk_size < config.max_batch_size:
        errors.append(
            f"--chunk_size {config.chunk_size} must be at least --max_batch_size "
            f"{config.max_batch_size}: each running request needs a token in every step."
        )
    if config.optimize_config_path:
        try:
            find_rules(config.optimize_config_path)
        except ConfigError as error:
            errors.append(str(error))
    if not _is_device(config.device):
        errors.append(f"--device is {config.device!r}; valid are auto, cpu, cuda and cuda:N.")
    if config.host not in LOOPBACK and not config.api_key:
        found.warnings.append(
            f"--host {config.host} lets other machines use the server without a key; set --api_key."
        )


def _is_device(text: str) -> bool:
    kind, colon, index = text.partition(":")
    return text in {"auto", "cpu", "cuda"} or (kind == "cuda" and bool(colon) and index.isdecimal())


def open_log(config: Config) -> TextIO | None:
    """The stream of --log_file, None for standard error. Raises ConfigError."""
    if not config.log_file:
        return None
    path = Path(config.log_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise ConfigError(
            f"--log_file {path} cannot be written: {error.strerror or error}."
        ) from error


# ---- texts


def build_parser() -> argparse.ArgumentParser:
    """The parser that formats --help; one argument per field of the table."""
    parser = argparse.ArgumentParser(
        prog="python -m kt_async",
        usage="python -m kt_async [MODEL] [flags]",
        description="Serve a mixture-of-experts model over an OpenAI-compatible API.",
        epilog=_EXAMPLES,
        formatter_class=_Formatter,
        add_help=False,
        allow_abbrev=False,
    )
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    for name, kind, option in options():
        text = option_help(name, option).replace("%", "%%")
        if kind is bool:
            switch = default_of(name) is True
            groups[option.group].add_argument(
                f"--no-{name}" if switch else f"--{name}",
                action="store_true",
                help=f"do not {text}" if switch else text,
            )
        else:
            metavar = option.metavar or _metavar(kind, option)
            groups[option.group].add_argument(f"--{name}", metavar=metavar, help=text)
    groups["commands"].add_argument("--version", action="store_true", help="print the version")
    groups["commands"].add_argument("-h", "--help", action="store_true", help="print this help")
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Fixed columns, so that the help looks the same everywhere."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def _metavar(kind: type, option: Option) -> str:
    if option.choices and len(option.choices) <= 3:
        return "|".join(option.choices)
    return {int: "N", float: "X"}.get(kind, "TEXT")


def option_help(name: str, option: Option) -> str:
    """Help text with choices, unit and default, as in --help and the README."""
    notes = []
    if len(option.choices) > 3:
        notes.append(" | ".join(option.choices))
    if option.unit:
        notes.append(option.unit)
    default = default_of(name)
    if option.auto:
        notes.append(f"default: {option.auto}")
    elif not isinstance(default, bool):
        notes.append(f"default: {show(default)}")
    return option.help + (f" ({'; '.join(notes)})" if notes else "")


def help_text() -> str:
    """The whole --help page."""
    return build_parser().format_help()


def print_config_text(config: Config) -> str:
    """One line per setting: name, value, where it comes from; ends with a newline."""
    rows = describe(config)
    name_width = max(len(name) for name, _, _ in rows)
    value_width = min(40, max(len(value) for _, value, _ in rows))
    return "".join(
        f"{name:<{name_width}}  {value:<{value_width}}  {source}".rstrip() + "\n"
        for name, value, source in rows
    )


def flag_table() -> str:
    """The README's table of flags (Markdown), generated so that it cannot drift."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for name, kind, option in options():
        value = default_of(name)
        default = option.auto or (
            "on" if value is True else "off" if value is False else show(value)
        )
        unit = f" [{option.unit}]" if option.unit else ""
        choices = (
            f" One of {', '.join(f'`{c}`' for c in option.choices)}"
            f"{'.' if option.low is None else ', or a number.'}"
            if option.choices
            else ""
        )
        spelling = f"--no-{name}" if kind is bool and default_of(name) is True else f"--{name}"
        differs = f" (KTransformers: {option.published})" if option.published else ""
        text = f"{option.help}{unit}.{choices}{differs}".replace("|", "\\|")
        lines.append(f"| `{spelling}` | {default} | {text} |")
    return "\n".join(lines)


def format_error(error: KtError) -> str:
    """What the user sees on standard error before exit code 2."""
    lines = str(error).splitlines() or ["unknown configuration error"]
    return "\n".join(f"kt_async: error: {line}" for line in lines)
