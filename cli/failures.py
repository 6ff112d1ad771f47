"""An exception as one sentence and an exit code."""

from __future__ import annotations

from typing import Any

import typer

from loram.errors import LoramError, is_disk_full, is_out_of_memory

from .options import nearest_flag

# typer shows BadParameter but not its parent classes; this avoids importing click, which newer typers vendor.
ClickError: type[Exception] = typer.BadParameter.__mro__[2]

BUG = "; this is a bug in loram: run again with -v for the traceback and please report it"
NO_MEMORY = (
    "out of memory; use a smaller --batch or --max-length, or a smaller model (`loram plan MODEL --memory SIZE`)"
)


class Cancelled(Exception):
    """Ctrl-C in a stage that cannot be resumed."""


def describe(error: BaseException) -> tuple[str, int]:
    """What to say about an exception, and the exit code."""
    if isinstance(error, LoramError):
        return str(error), error.exit_code
    if isinstance(error, ClickError):
        return usage_sentence(error), 2
    if isinstance(error, KeyboardInterrupt | Cancelled | typer.Abort):
        return "interrupted", 130
    if is_out_of_memory(error):
        return NO_MEMORY, 3
    if is_disk_full(error):
        return "the disk is full; free some space, or write elsewhere with -o", 3
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" + BUG, 1


def usage_sentence(error: Any) -> str:
    """A usage error of the parser, in loram's own words."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "loram"
    if type(error).__name__ == "NoSuchOption":
        known = context.command.params if context else []
        return f"{where} has no option {error.option_name}" + (
            nearest_flag(error.option_name, known) or f"; see `{where} --help`"
        )
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"{where}: {message[:1].lower()}{message[1:]}; see `{where} --help`"
