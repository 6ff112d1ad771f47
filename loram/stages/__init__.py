"""One verb per file. The table says where each stage's function is, without importing any of them.

Here the functions also get their Python face: `loram.prune(model, out=..., ratio=...)` builds the same options as
the command line does and calls the same function.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from os import PathLike
from typing import Any, TypeVar, get_type_hints

from loram.importing import collecting_paused
from loram.options import SECTIONS, StageOptions, from_mapping, require
from loram.progress import SILENT, Progress
from loram.recipe import said_outright
from loram.results import StageResult

STAGE_FUNCTIONS: dict[str, str] = {
    "plan": "loram.stages.plan:plan",
    "prune": "loram.stages.prune_random:prune",
    "align": "loram.stages.align:align",
    "quantize": "loram.stages.quantize:quantize",
    "train": "loram.stages.train:train",
    "recover": "loram.stages.recover:recover",
    "project": "loram.stages.project:project",
    "verify": "loram.stages.verify:verify",
    "merge": "loram.stages.merge:merge",
    "push": "loram.stages.push:push",
    "eval": "loram.stages.evaluate:evaluate",
    "data": "loram.stages.preview:preview",
    "run": "loram.stages.run:run",
    "demo": "loram.stages.demo:demo",
    "init": "loram.stages.init:init",
}

Options = TypeVar("Options", bound=StageOptions)


def stage_function(name: str) -> Callable[[Any, Progress], StageResult]:
    """The function of a stage; imports its module, and with it torch where the stage needs it."""
    module, _, function = STAGE_FUNCTIONS[name].partition(":")
    with collecting_paused():
        found: Callable[[Any, Progress], StageResult] = getattr(import_module(module), function)
    return found


def python_function(name: str, stage: str) -> Callable[..., StageResult]:
    """The stage as a Python function called `name`, with the options as keyword arguments."""
    kind = SECTIONS[stage]

    def function(*inputs: str | PathLike[str], progress: Progress = SILENT, **options: Any) -> StageResult:
        built = from_arguments(kind, inputs, options, f"{name}()")
        return stage_function(stage)(built, progress)

    helps = [f"    {item.name}: {item.metadata['help']}" for item in dataclasses.fields(kind)]
    function.__name__ = function.__qualname__ = name
    function.__module__ = "loram"
    function.__doc__ = "\n".join([str(kind.__doc__), "", "Options:", *helps])
    function.__signature__ = signature(kind)  # type: ignore[attr-defined]
    return function


def from_arguments(kind: type[Options], inputs: Sequence[object], values: dict[str, Any], where: str) -> Options:
    """Options of a Python call: `inputs` fill the positional fields in their order, `values` the named ones."""
    names = [item.name for item in dataclasses.fields(kind) if item.metadata.get("argument")]
    require(
        len(inputs) <= len(names),
        f"{where} takes {len(names)} positional input(s) ({', '.join(names) or 'none'}) but got {len(inputs)}; "
        "give the others by name",
    )
    given: dict[str, Any] = dict(zip(names, inputs, strict=False))
    twice = sorted(given.keys() & values.keys())
    require(not twice, f"{where} got {', '.join(twice)} twice, by position and by name; give it once")
    given |= values
    outright = said_outright(kind, given)
    more = {"overrides": (*given.get("overrides", ()), *outright)} if outright else {}
    return from_mapping(kind, given | more, where)


def signature(kind: type[StageOptions]) -> inspect.Signature:
    """What `inspect.signature` and a notebook show: positional inputs, options by keyword, and `progress`."""
    hints = get_type_hints(kind)
    ordered = sorted(dataclasses.fields(kind), key=lambda item: not item.metadata.get("argument"))
    parameters = [
        inspect.Parameter(
            item.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD
            if item.metadata.get("argument")
            else inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if item.default is dataclasses.MISSING else item.default,
            annotation=hints[item.name],
        )
        for item in ordered
    ]
    last = inspect.Parameter("progress", inspect.Parameter.KEYWORD_ONLY, default=SILENT, annotation=Progress)
    return inspect.Signature([*parameters, last], return_annotation=StageResult)
