"""Options: the one place where they are defined, checked and converted."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loram.errors import OptionError
from loram.families.widths import parse_ratio
from loram.option_fields import command_line
from loram.options import (
    SECTIONS,
    PruneOptions,
    RunOptions,
    StageOptions,
    TrainOptions,
    did_you_mean,
    from_mapping,
)
from loram.stages import STAGE_FUNCTIONS

ALLOWED = ("str", "int", "float", "bool", "str | None", "int | None", "float | None", "tuple[str, ...]")
KINDS = pytest.mark.parametrize("kind", SECTIONS.values(), ids=list(SECTIONS))


def minimal(kind: type[StageOptions]) -> dict[str, Any]:
    return {item.name: "x" for item in dataclasses.fields(kind) if item.default is dataclasses.MISSING}


def test_every_section_has_a_stage() -> None:
    assert list(SECTIONS) == list(STAGE_FUNCTIONS)


@KINDS
def test_fields_are_plain_and_explained(kind: type[StageOptions]) -> None:
    assert kind.__doc__
    hints = get_type_hints(kind)
    flags = []
    for item in dataclasses.fields(kind):
        hint = str(hints[item.name]).replace("<class '", "").replace("'>", "")
        assert hint in ALLOWED, f"{item.name}: {hint}"
        assert str(item.metadata["help"]).endswith("."), item.name
        flags += ["--" + item.name.replace("_", "-"), *item.metadata.get("flags", ())]
        if "choices" in item.metadata:
            assert item.default is None or item.default in item.metadata["choices"]
    assert len(flags) == len(set(flags)), "a flag means one thing"


@KINDS
def test_options_survive_json(kind: type[StageOptions]) -> None:
    options = from_mapping(kind, minimal(kind), "test")
    assert from_mapping(kind, options.to_json(), "test") == options


@KINDS
def test_missing_and_misspelt(kind: type[StageOptions]) -> None:
    with pytest.raises(OptionError, match=r"test has no option 'sede'; did you mean seed\?"):
        from_mapping(kind, minimal(kind) | {"sede": 1}, "test")
    for name in minimal(kind):
        with pytest.raises(OptionError, match=f"test needs {name}"):
            from_mapping(kind, {key: "x" for key in minimal(kind) if key != name}, "test")


@pytest.mark.parametrize(
    ("values", "field", "expected"),
    [
        ({"ratio": 0.65}, "ratio", "0.65"),
        ({"ratio": "13/20"}, "ratio", "13/20"),
        ({"keep-first": 2}, "keep_first", 2),
        ({"calibration": "a.txt, builtin"}, "calibration", ("a.txt", "builtin")),
        ({"calibration": ["a,b.txt"]}, "calibration", ("a,b.txt",)),
        ({"calibration": Path("a.txt")}, "calibration", ("a.txt",)),
        ({"out": Path("small")}, "out", "small"),
        ({"revision": None}, "revision", None),
    ],
)
def test_conversion(values: dict[str, Any], field: str, expected: Any) -> None:
    assert getattr(from_mapping(PruneOptions, {"model": "m"} | values, "test"), field) == expected


@pytest.mark.parametrize(
    "values",
    [
        {"ratio": 0},
        {"ratio": 1},
        {"ratio": -1},
        {"ratio": float("nan")},
        {"ratio": float("inf")},
        {"ratio": "abc"},
        {"ratio": "1/0"},
        {"ratio": True},
        {"ratio": None},
        {"ratio": ["0.5"]},
        {"keep_first": -1},
        {"keep_first": 1.5},
        {"keep_first": True},
        {"keep_first": "4"},
        {"refit": "yes"},
        {"refit": 1},
        {"round_to": 0},
        {"samples": 0},
        {"method": "structred"},
        {"score": "none"},
    ],
)
def test_impossible_prune_values(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        from_mapping(PruneOptions, {"model": "m"} | values, "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"rank": 0},
        {"steps": 0},
        {"epochs": 0},
        {"epochs": float("inf")},
        {"dropout": 1.0},
        {"dropout": float("nan")},
        {"lr": float("nan")},
        {"lr": -1e-4},
        {"lr": "fast"},
        {"alpha": 0},
        {"warmup": -1},
        {"max_length": 1},
        {"batch": 0},
        {"accumulate": 0},
        {"log_every": 0},
        {"dtype": "fp8"},
        {"schedule": "cosin"},
    ],
)
def test_impossible_train_values(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        from_mapping(TrainOptions, {"model": "m"} | values, "test")


def test_yaml_writes_some_floats_as_text() -> None:
    assert from_mapping(TrainOptions, {"model": "m", "lr": "1e-5"}, "test").lr == 1e-5


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # of a busy machine it says nothing
@given(st.fractions(min_value=0, max_value=1).filter(lambda ratio: 0 < ratio < 1))
def test_ratios_are_exact(ratio: Any) -> None:
    assert parse_ratio(PruneOptions(model="m", ratio=str(ratio)).ratio) == ratio


def test_did_you_mean_is_silent_about_strangers() -> None:
    assert did_you_mean("ratoi", ["ratio", "rank"]) == "; did you mean ratio?"
    assert did_you_mean("zzz", ["ratio", "rank"]) == ""


def test_command_line_says_what_differs_from_the_defaults() -> None:
    options = TrainOptions(model="my small", data=("a.jsonl", "b.jsonl"), out="o", lr=1e-3, checkpointing=True)
    line = command_line("train", options)
    assert line == "loram train 'my small' -o o --data a.jsonl --data b.jsonl --lr 0.001 --checkpointing"
    assert "--no-refit" in command_line("prune", PruneOptions(model="m", refit=False))
    assert shlex.split(command_line("run", RunOptions(recipe="r", overrides=("train.steps=3",))))[-2:] == [
        "--set",
        "train.steps=3",
    ]
