"""lm-eval is optional: without it, one sentence; with it, its numbers (a stand-in here, not lm-eval itself)."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from loram.errors import OptionError
from loram.evaluation.tasks import run_tasks


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OptionError, match=r"pip install 'loram\[eval\]'"):
        run_tasks(object(), object(), ("hellaswag",), 4, None)


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    class HFLM:
        def __init__(self, **options: Any) -> None:
            self.options = options

    class TaskManager:
        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name == "hellaswag"]

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        calls.append(options)
        return {"results": {"hellaswag": {"alias": "hellaswag", "acc,none": 0.25, "acc_stderr,none": "N/A"}}}

    for name, members in {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_the_model_in_memory_is_what_lm_eval_gets(lm_eval: list[dict[str, Any]]) -> None:
    model, tokenizer = object(), object()
    assert run_tasks(model, tokenizer, ("hellaswag",), 4, 10) == {"hellaswag": {"acc,none": 0.25}}
    (call,) = lm_eval
    assert call["model"].options == {"pretrained": model, "tokenizer": tokenizer, "batch_size": 4}
    assert (call["tasks"], call["limit"]) == (["hellaswag"], 10)


@pytest.mark.usefixtures("lm_eval")
def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(OptionError, match="--tasks names nonsense, which lm-eval does not know"):
        run_tasks(object(), object(), ("hellaswag", "nonsense"), 4, None)
