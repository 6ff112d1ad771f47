"""`loram`: one command per stage, and a few that only look.

Nothing heavy is imported here: help and usage errors answer at once, and a stage's module is imported when its
options are known to be right.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from loram.errors import OptionError
from loram.importing import end_at_once
from loram.options import SECTIONS, did_you_mean
from loram.recipe import recipe_text
from loram.version import __version__

from .console import Console
from .failures import Cancelled, describe
from .options import Invocation, StageCommand, command, normalize, restore_argument_help, stub
from .recipes import build_options, descriptions

CONTEXT = {"token_normalize_func": normalize, "help_option_names": ["-h", "--help"]}
EPILOG = "Start with: loram demo · loram plan MODEL --memory 24GiB · loram recipes"

HELP = "Train LoRA on a small, pruned copy of a large model, then carry the adapter back. Train small, infer large."

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="Print less.")]
VerboseFlag = Annotated[bool, typer.Option("--verbose", "-v", help="Print more, and tracebacks.")]


def show_version(wanted: bool) -> None:
    if wanted:
        Console().text(f"loram {__version__}")
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def run_stage(call: Invocation) -> int:
    """Check the options, run the stage, print its result; the exit code."""
    console = Console(json=call.json, quiet=call.quiet or follower(), verbose=call.verbose and not follower())
    options = build_options(call)
    from loram.stages import stage_function

    try:
        with console.working() as progress:
            result = stage_function(call.stage)(options, progress)
    except KeyboardInterrupt as interrupt:  # typer would turn it into a silent exit
        raise Cancelled from interrupt
    if not follower():
        console.result(result)
    return result.exit_code


def follower() -> bool:
    """Whether a launcher started this process beside a first one, which does the talking."""
    return os.environ.get("RANK", "0") != "0"


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe instead of the list.")] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> int:
    """List the packaged recipes, or print one."""
    console = Console(json=json, quiet=quiet, verbose=verbose)
    if name is not None:
        text = recipe_text(name)
        console.document({"name": name, "text": text}, text)
    else:
        found = descriptions()
        rows = [{"name": key, "description": value} for key, value in found.items()]
        console.pairs({"recipes": rows}, found, "next: loram run NAME --model MODEL --data FILE -o RUN")
    return 0


def doctor(json: JsonFlag = False, quiet: QuietFlag = False, verbose: VerboseFlag = False) -> int:
    """What this machine and installation have, for bug reports."""
    from .doctor import examine

    report = examine()
    Console(json=json, quiet=quiet, verbose=verbose).pairs(report, {key: str(value) for key, value in report.items()})
    return 0


def parser(verb: str | None) -> Any:
    """The command tree. Only `verb` gets its options (None: all do); the others are but names in the help."""
    app = typer.Typer(name="loram", help=HELP, epilog=EPILOG, context_settings=CONTEXT, rich_markup_mode=None)
    app.callback()(root)
    for stage, kind in SECTIONS.items():
        full = verb in (None, stage)
        function = command(stage, kind, run_stage) if full else stub(kind)
        app.command(stage, cls=StageCommand, context_settings=CONTEXT)(function)
    app.command("recipes", context_settings=CONTEXT)(recipes)
    app.command("doctor", context_settings=CONTEXT)(doctor)
    group: Any = typer.main.get_command(app)
    restore_argument_help(group.commands, SECTIONS)
    return group


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; errors are one sentence on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    quiet_libraries()
    end_at_once()
    try:
        check_verb(words[0])
        completing = "_LORAM_COMPLETE" in os.environ
        code = parser(None if completing else normalize(words[0])).main(
            args=words, prog_name="loram", standalone_mode=False
        )
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # `loram recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        sentence, code = describe(error)
        if follower():
            sentence = f"process {os.environ['RANK']}: {sentence}"
        Console(verbose=bool({"-v", "--verbose"} & set(words))).error(sentence, error)
        return code


def check_verb(word: str) -> None:
    """Refuse an unknown command with the nearest one; the parser's own wording differs between versions."""
    known = [*SECTIONS, "recipes", "doctor"]
    if not word.startswith("-") and normalize(word) not in known:
        raise OptionError(f"loram has no command {word!r}" + (did_you_mean(word, known) or "; see `loram --help`"))


def quiet_libraries() -> None:
    """Progress bars and advice of the libraries underneath would tear our own display; the environment wins."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads collapse where anything else runs
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
