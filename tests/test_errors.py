"""The tree of errors: what its docstring draws is what there is."""

from __future__ import annotations

import inspect
import re

from loram import errors
from loram.errors import LoramError

CLASSES = {name: kind for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, LoramError)}
DRAWN = re.findall(r"^ *([│├└─ ]*)(\w+) +(\d+)\b", str(errors.__doc__), flags=re.MULTILINE)


def test_the_drawing_is_complete_and_true() -> None:
    assert {name: int(code) for _, name, code in DRAWN} == {name: kind.exit_code for name, kind in CLASSES.items()}
    parents = {0: "LoramError"}
    for lines, name, _ in DRAWN:
        depth = len(lines) // 4
        parents[depth] = name
        if depth:
            assert CLASSES[name].__base__ is CLASSES[parents[depth - 1]], name


def test_exit_codes_are_the_documented_ones() -> None:
    assert {kind.exit_code for kind in CLASSES.values()} == {1, 2, 3, 4, 5, 6, 75}


def test_nothing_is_a_bare_loram_error() -> None:
    subclasses = [kind for kind in CLASSES.values() if kind is not LoramError]
    assert all(kind.exit_code != 1 for kind in subclasses)
    assert all(kind.__doc__ for kind in CLASSES.values())
