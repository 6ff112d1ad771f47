"""An option dataclass as a typer command: each field becomes a flag with its own help, default and aliases.

Every flag's default is None here, which means "not given": recipe, `--set` and the dataclass's own defaults fill
the rest (recipes.py). The true default is written into the help instead.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from loram.errors import OptionError
from loram.options import StageOptions, did_you_mean, flag

COMMON = "Common options"
COMMON_FIELDS = ("seed", "force", "dry_run")
ALIAS = "__alias__"


@dataclass(frozen=True)
class Invocation:
    """What one command line said: the flags that were given, and how to run and print."""

    stage: str
    kind: type[StageOptions]
    given: dict[str, Any]
    recipe: str | None
    assignments: tuple[str, ...]
    json: bool
    quiet: bool
    verbose: bool


def command(stage: str, kind: type[StageOptions], runner: Callable[[Invocation], int]) -> Callable[..., int]:
    """The function that typer reads: its signature has a parameter per option of `kind`."""

    def function(**parameters: Any) -> int:
        common = {name: parameters.pop(name) for name in ("recipe_file", "assignments", "json", "quiet", "verbose")}
        return runner(
            Invocation(
                stage=stage,
                kind=kind,
                given=merge_aliases(parameters),
                recipe=common["recipe_file"],
                assignments=tuple(common["assignments"] or ()),
                json=bool(common["json"]),
                quiet=bool(common["quiet"]),
                verbose=bool(common["verbose"]),
            )
        )

    parameters = [*option_parameters(kind), *common_parameters(stage)]
    function.__name__ = stage
    function.__doc__ = kind.__doc__
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {item.name: item.annotation for item in parameters}
    return function


def stub(kind: type[StageOptions]) -> Callable[[], None]:
    """A command that is only listed."""

    def function() -> None:
        raise AssertionError("a stub is never run")

    function.__doc__ = kind.__doc__
    return function


def option_parameters(kind: type[StageOptions]) -> Iterator[inspect.Parameter]:
    """Positional inputs first, then the output, then the stage's own options, then what all stages share."""
    hints = get_type_hints(kind)

    def rank(item: dataclasses.Field[Any]) -> tuple[bool, bool, bool]:
        return not item.metadata.get("argument"), item.name in COMMON_FIELDS, item.name != "out"

    for item in sorted(dataclasses.fields(kind), key=rank):
        if item.metadata.get("assignments"):
            continue
        hint = flag_type(hints[item.name])
        if item.metadata.get("argument"):
            yield parameter(item.name, hint, typer.Argument(metavar=item.name.upper(), help=help_text(item)))
        else:
            yield parameter(item.name, hint, visible_option(item, hint))
        for number, alias in enumerate(item.metadata.get("flags", ())):
            yield parameter(f"{item.name}{ALIAS}{number}", hint, typer.Option(spelled(alias, hint), hidden=True))


def visible_option(item: dataclasses.Field[Any], hint: Any) -> Any:
    """The option as the help shows it."""
    names = [spelled("--" + flag(item.name), hint)]
    if "short" in item.metadata:
        names.append(item.metadata["short"])
    return typer.Option(
        *names,
        help=help_text(item),
        metavar="NAME" if "choices" in item.metadata else None,
        rich_help_panel=COMMON if item.name in COMMON_FIELDS else None,
        show_default=False,
    )


def common_parameters(stage: str) -> list[inspect.Parameter]:
    """What every command takes besides its options."""
    section = f"section '{stage}'" if stage not in ("run", "demo") else "all sections"
    example = "KEY=VALUE" if stage not in ("run", "demo") else "SECTION.KEY=VALUE"

    def option(*names: str, **settings: Any) -> Any:
        return typer.Option(*names, rich_help_panel=COMMON, show_default=False, **settings)

    return [
        parameter(
            "recipe_file",
            str,
            option("--recipe", metavar="FILE|NAME", help=f"Take the options from a recipe ({section}); flags win."),
        ),
        parameter(
            "assignments", list[str], option("--set", metavar=example, help="Set one option, over the recipe's.")
        ),
        parameter("json", bool, option("--json", help="Print one JSON object on stdout, all else on stderr.")),
        parameter("quiet", bool, option("--quiet", "-q", help="Print warnings and the last line only.")),
        parameter("verbose", bool, option("--verbose", "-v", help="Print more, and tracebacks.")),
    ]


def parameter(name: str, hint: Any, declaration: Any) -> inspect.Parameter:
    """A keyword parameter that is None unless it was given."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[hint | None, declaration]
    )


def flag_type(hint: Any) -> Any:
    """The type that typer converts to: a field's type without its `| None`, lists for tuples."""
    for kind in (bool, int, float):
        if hint in (kind, kind | None):
            return kind
    return list[str] if "tuple" in str(hint) else str


def spelled(name: str, hint: Any) -> str:
    """A flag, with its `--no-` twin for a switch."""
    return f"{name}/--no-{name.removeprefix('--')}" if hint is bool else name


def help_text(item: dataclasses.Field[Any]) -> str:
    """The field's help, choices and default."""
    notes = ["|".join(item.metadata.get("choices", ()))]
    default = item.default
    if default is True:
        notes.append("default: on")
    elif default not in (dataclasses.MISSING, None, "", (), False):
        notes.append("default: " + (",".join(default) if isinstance(default, tuple) else str(default)))
    shown = "; ".join(note for note in notes if note)
    return str(item.metadata.get("help", "")) + (f" ({shown})" if shown else "")


class StageCommand(TyperCommand):
    """A command whose positional inputs are listed once: click 8.5 and typer 0.20 both would."""

    def format_arguments(self, ctx: Any, formatter: Any) -> None:
        """Left to typer, which lists them among the options."""


def restore_argument_help(commands: Mapping[str, Any], kinds: Mapping[str, type[StageOptions]]) -> None:
    """Give positional inputs their help back, which click 8.5 forgets when typer 0.20 passes it."""
    for stage, kind in kinds.items():
        helps = {item.name: help_text(item) for item in dataclasses.fields(kind)}
        for item in commands[stage].params:
            item.help = getattr(item, "help", None) or helps.get(item.name)


def merge_aliases(parameters: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, each under its own name, whichever of its flags was used."""
    given: dict[str, Any] = {}
    for name, value in parameters.items():
        if value is None or value == []:
            continue
        field_name = name.partition(ALIAS)[0]
        if field_name in given:
            raise OptionError(f"--{flag(field_name)} was given twice, under two of its names; give it once")
        given[field_name] = [part for text in value for part in text.split(",")] if isinstance(value, list) else value
    return given


def normalize(token: str) -> str:
    """Underscores and hyphens are the same in flags."""
    return token.replace("_", "-")


def nearest_flag(name: str, parameters: list[Any]) -> str:
    """'; did you mean --ratio?' among the visible flags of a command."""
    visible = [flag for item in parameters if not getattr(item, "hidden", False) for flag in item.opts]
    hidden = [flag for item in parameters if getattr(item, "hidden", False) for flag in item.opts]
    longs = [flag for flag in visible if flag.startswith("--")]
    return did_you_mean(normalize(name), longs) or did_you_mean(normalize(name), hidden)
