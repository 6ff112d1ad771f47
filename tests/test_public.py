"""The Python face: which names there are, what they show, and that importing them is cheap."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loram
import loram.stages
from loram.errors import OptionError
from loram.options import SECTIONS, PruneOptions, StageOptions
from loram.progress import SILENT, Progress
from loram.results import StageResult

STAGES = {{"eval": "evaluate", "data": "preview"}.get(name, name): kind for name, kind in SECTIONS.items()}


def test_the_public_names() -> None:
    assert loram.__all__ == sorted(loram.__all__)
    assert set(loram.__all__) == {*STAGES, "load_small", "register", "__version__"}
    assert set(loram.__all__) <= set(dir(loram))
    assert all(getattr(loram, name) is not None for name in loram.__all__)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        loram.quantise  # noqa: B018


def test_importing_is_cheap() -> None:
    code = (
        "import json, sys, loram\n"
        "shown = [loram.prune.__doc__, str(loram.__version__)]\n"
        "print(json.dumps([name for name in ('torch', 'transformers', 'peft', 'typer') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_kernel_that_nobody_asked_for_is_not_asked_for() -> None:
    """bitsandbytes does so when it is imported on some CPUs; here is what it says, word for word, and another word."""
    code = (
        "import logging, loram\n"
        "said = logging.getLogger('bitsandbytes.backends.cpu.ops').warning\n"
        "said('Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please', 'No module')\n"
        "said('something else')\n"
        "import loram.stages.train"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "something else\n"


@pytest.mark.parametrize("name", STAGES)
def test_signatures_show_the_options(name: str) -> None:
    function = getattr(loram, name)
    parameters = inspect.signature(function).parameters
    options = inspect.signature(STAGES[name]).parameters
    assert set(parameters) == {*options, "progress"}
    for key, parameter in parameters.items():
        if key != "progress":
            assert parameter.default == options[key].default
    assert function.__name__ == name
    assert function.__doc__.startswith(str(STAGES[name].__doc__))
    positional = [key for key, item in parameters.items() if item.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert list(parameters)[: len(positional)] == positional


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, StageOptions, Progress]]:
    seen: list[tuple[str, StageOptions, Progress]] = []

    def stage_function(name: str) -> Any:
        def function(options: StageOptions, progress: Progress) -> StageResult:
            seen.append((name, options, progress))
            return StageResult(path=Path("out"), next_command="loram train out")

        return function

    monkeypatch.setattr(loram.stages, "stage_function", stage_function)
    return seen


def test_a_call_is_the_command(calls: list[tuple[str, StageOptions, Progress]]) -> None:
    result = loram.prune(Path("big"), out=Path("small"), ratio=0.65, calibration="a.txt,builtin")
    expected = PruneOptions(model="big", out="small", ratio="0.65", calibration=("a.txt", "builtin"))
    assert calls == [("prune", expected, SILENT)]
    assert str(result) == "wrote out\nnext: loram train out"
    loram.project("adapter", "small", out="x")
    loram.evaluate(model="big", data=["a.txt"])
    assert [name for name, _, _ in calls] == ["prune", "project", "eval"]
    assert vars(calls[1][1])["small"] == "small"


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        (("big",), {"rato": 0.5}, r"prune\(\) has no option 'rato'; did you mean ratio\?"),
        ((), {}, r"prune\(\) needs model"),
        (("a", "b"), {}, r"prune\(\) takes 1 positional input\(s\) \(model\) but got 2"),
        (("a",), {"model": "b"}, r"prune\(\) got model twice"),
        (("a",), {"ratio": 2}, "--ratio is 2"),
    ],
)
def test_wrong_calls(
    arguments: tuple[str, ...], options: dict[str, Any], sentence: str, calls: list[tuple[str, StageOptions, Progress]]
) -> None:
    with pytest.raises(OptionError, match=sentence):
        loram.prune(*arguments, **options)
    assert calls == []
