"""Steps are whole or not there, and only ever gone on with by the work they belong to."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from loram.errors import Interrupted
from loram.sealing import FOLDER, Steps, checkpoints_of, discard, keep_only_steps, set_aside


def write(steps: Steps, name: str, text: str) -> None:
    with steps.writing(name) as folder:
        (folder / "found.txt").write_text(text)


def test_a_step_is_there_for_the_same_work_only(tmp_path: Path) -> None:
    place, mine = tmp_path / FOLDER, {"ratio": "0.5", "layers": (1, 2)}
    write(Steps(place, mine), "block-0001", "axes")
    again = Steps(place, mine)
    assert again.whole("block-0001")
    assert not again.whole("block-0002")
    assert (again.folder("block-0001") / "found.txt").read_text() == "axes"
    assert not Steps(place, mine | {"ratio": "0.6"}).whole("block-0001")
    assert not Steps(place, mine).whole("block-0001"), "what other work has deleted stays deleted"


def test_folders_of_unknown_work_are_deleted(tmp_path: Path) -> None:
    place = tmp_path / FOLDER
    write(Steps(place, {"a": 1}), "block-0001", "axes")
    (place / "run.json").write_text("{")
    assert not Steps(place, {"a": 1}).whole("block-0001")


def test_a_step_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    steps = Steps(tmp_path, {})
    with pytest.raises(ZeroDivisionError), steps.writing("block-0001") as folder:
        (folder / "found.txt").write_text(str(1 / 0))
    assert not steps.whole("block-0001")
    assert list(tmp_path.glob("block-*")) == [tmp_path / "block-0001.partial"]
    Steps(tmp_path, {})
    assert not list(tmp_path.glob("block-*"))


@pytest.mark.parametrize("text", ["other", None])
def test_a_damaged_step_is_done_again(text: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(Steps(tmp_path, {}), "block-0001", "axes")
    file = tmp_path / "block-0001" / "found.txt"
    file.unlink()
    if text is not None:
        file.write_text(text)
    steps = Steps(tmp_path, {})
    with caplog.at_level(logging.WARNING):
        assert not steps.whole("block-0001")
    assert "block-0001 is damaged (found.txt" in caplog.text
    write(steps, "block-0001", "anew")
    assert steps.whole("block-0001")
    assert Steps(tmp_path, {}).whole("block-0001")


def test_an_empty_step_is_whole(tmp_path: Path) -> None:
    with Steps(tmp_path, {}).writing("block-0001"):
        pass
    assert Steps(tmp_path, {}).whole("block-0001")


def test_dropped_steps_are_gone(tmp_path: Path) -> None:
    steps = Steps(tmp_path, {})
    write(steps, "block-0001", "axes")
    steps.drop("block-0001")
    steps.drop("block-0007")
    assert not steps.whole("block-0001")
    assert not (tmp_path / "block-0001").exists()


def test_stopping(tmp_path: Path) -> None:
    asked: list[Exception] = []
    steps = Steps(tmp_path, {}, lambda: asked[0] if asked else None)
    steps.stop_here()
    assert not steps.urgent
    asked.append(Interrupted("stopped by SIGTERM"))
    assert steps.urgent
    with pytest.raises(Interrupted, match="SIGTERM"):
        steps.stop_here()


def test_steps_wait_beside_out_while_it_is_put_in_place(tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    write(Steps(checkpoints_of(out), {}), "block-0001", "axes")
    (partial / "model.safetensors").write_text("half")
    (partial / "spill").mkdir()
    (partial / "loram.log").write_text("said")
    keep_only_steps(partial)
    assert sorted(item.name for item in partial.iterdir()) == [FOLDER, "loram.log"]
    set_aside(partial, out)
    assert not (partial / FOLDER).exists()
    assert Steps(checkpoints_of(out), {}).whole("block-0001"), "a call killed in between goes on"
    discard(out)
    assert not checkpoints_of(out).exists()
