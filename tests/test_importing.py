"""What the garbage collector does while libraries are imported, and when a command ends."""

from __future__ import annotations

import gc
import subprocess
import sys
from contextlib import suppress

import pytest

from loram.importing import collecting_paused

CYCLE = """
class Cycle:
    def __init__(self): self.me = self
    def __del__(self): print("collected")
Cycle()
"""


def test_collecting_is_paused_and_goes_on() -> None:
    with suppress(ImportError), collecting_paused():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_collecting_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collecting_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("before", "found"),
    [
        ("", True),
        ("import loram", True),
        ("from loram.importing import end_at_once; end_at_once(); end_at_once()", False),
        ("from loram_cli.app import main; main(['recipes', '--quiet'])", False),
    ],
    ids=["python", "library", "asked", "command"],
)
def test_only_a_command_ends_without_a_last_search_for_cycles(before: str, found: bool) -> None:
    code = f"import gc; gc.disable()\n{before}\n{CYCLE}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("collected" in ended.stdout.splitlines()) is found
