"""What option dataclasses are made of: fields that carry their own help, and conversion into their types.

Field types are limited to `str`, `int`, `float`, `bool`, their `| None`, and `tuple[str, ...]`.
`metadata` keys: `help`; `argument` (positional); `choices`; `short` (a one-letter flag); `flags` (hidden long
aliases); `assignments` (no flag of its own: the command line's `--set` fills it).
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

from loram.errors import OptionError

Options = TypeVar("Options", bound="StageOptions")

DTYPES = ("bf16", "fp16", "fp32")
RUNNING = {"resume", "save_every", "keep_checkpoints", "report_to", "hidden_memory"}
"""Options that say how a run is kept going, and nothing about what comes out."""


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A dataclass field that carries its own help."""
    return field(default=default, metadata={"help": text, **metadata})


def argument(text: str, **metadata: Any) -> Any:
    """A positional field without a default."""
    return field(metadata={"help": text, "argument": True, **metadata})


def assignments() -> Any:
    """The field that `--set` fills where a stage reads a whole recipe."""
    return option((), "Changes to the recipe, each section.key=value.", assignments=True)


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What every stage takes."""

    seed: int = option(0, "Seed of everything random: same seed, same machine, same result.")

    def __post_init__(self) -> None:
        check_choices(self)

    def to_json(self) -> dict[str, Any]:
        """The options as a JSON object."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in vars(self).items()}

    def outcome(self) -> dict[str, Any]:
        """Those that what comes out depends on, for manifests: all but how a run is kept going."""
        return {key: value for key, value in self.to_json().items() if key not in RUNNING}


@dataclass(frozen=True, kw_only=True)
class WritingOptions(StageOptions):
    """What every stage that writes a folder takes."""

    out: str = option("", "Folder to write; must not exist.", short="-o", flags=("--output-dir",))
    force: bool = option(False, "Replace OUT if it exists (it is moved aside until the new one is complete).")
    dry_run: bool = option(False, "Check everything, say what would be written, write nothing.")


def flag(name: str) -> str:
    """A field's name as it is typed on the command line."""
    return name.replace("_", "-")


def require(condition: bool, message: str) -> None:
    """Raise OptionError with `message` unless the condition holds."""
    if not condition:
        raise OptionError(message)


def check_choices(options: StageOptions) -> None:
    """Refuse a value outside a field's choices, naming the nearest one."""
    for item in fields(options):
        choices = item.metadata.get("choices")
        value = getattr(options, item.name)
        if choices and value not in choices and not (value is None and item.default is None):
            raise OptionError(
                f"--{flag(item.name)} is {value!r}; expected one of {', '.join(choices)}" + did_you_mean(value, choices)
            )


def did_you_mean(word: str, known: Any) -> str:
    """'; did you mean X?' for the nearest known word, or nothing."""
    close = get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def from_mapping(kind: type[Options], values: dict[str, Any], where: str) -> Options:
    """Options from a recipe section or keyword arguments.

    Hyphens and underscores are the same. An unknown key or a value of the wrong type raises
    OptionError that names `where` and the nearest known key.
    """
    known = {item.name: item for item in fields(kind)}
    hints = get_type_hints(kind)
    clean: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise OptionError(f"{where} has no option {key!r}" + did_you_mean(name, known))
        clean[name] = convert(value, hints[name], f"{where}: {name}")
    missing = [n for n, item in known.items() if n not in clean and item.default is dataclasses.MISSING]
    if missing:
        raise OptionError(f"{where} needs {', '.join(missing)}")
    return kind(**clean)


def convert(value: Any, hint: Any, where: str) -> Any:
    """One value as YAML or Python gives it, turned into the field's type, or refused."""
    text = str(hint).replace("<class '", "").replace("'>", "")
    if value is None and "None" in text:
        return None
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
        value = [value] if text.startswith("tuple") else value
    if text.startswith("tuple"):
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, (list, tuple)):
            return tuple(str(part).strip() for part in parts if str(part).strip())
    elif text.startswith("bool"):
        if isinstance(value, bool):
            return value
    elif text.startswith("int"):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif text.startswith("float"):
        number = as_float(value)
        if number is not None:
            return number
    elif text.startswith("str") and not isinstance(value, (bool, list, dict)) and value is not None:
        return repr(value) if isinstance(value, float) else str(value)
    raise OptionError(f"{where} is {value!r}; expected {text.replace(' | None', '')}")


def as_float(value: Any) -> float | None:
    """A number, also written as YAML 1.1 reads no number ('1e-5')."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def command_line(stage: str, options: StageOptions) -> str:
    """What to type for these options: positional inputs, then every option that differs from its default."""
    words = ["loram", stage]
    words += [str(getattr(options, item.name)) for item in fields(options) if item.metadata.get("argument")]
    for item in fields(options):
        value = getattr(options, item.name)
        if item.metadata.get("argument") or value == item.default:
            continue
        name = item.metadata.get("short", "--" + flag(item.name))
        if item.metadata.get("assignments"):
            words += [word for text in value for word in ("--set", text)]
        elif isinstance(value, bool):
            words.append(name if value else f"--no-{flag(item.name)}")
        elif isinstance(value, tuple):
            words += [word for part in value for word in (name, part)]
        else:
            words += [name, str(value)]
    return shlex.join(words)
