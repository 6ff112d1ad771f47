"""A calibration that was stopped goes on at its block and ends as one that nobody stopped, to the last byte."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loram.blockwise import hidden, resuming
from loram.errors import Interrupted, MismatchError, OptionError, OutputError, ResourceError
from loram.option_fields import command_line
from loram.options import PruneOptions, RunOptions
from loram.progress import Progress
from loram.sealing import Steps
from loram.stages import sparsify
from loram.stages.prune import prune
from loram.stages.prune_random import prune as streamed
from loram.stages.run import run

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
LAYERS = 4  # of the fixture
HOW: dict[str, dict[str, Any]] = {
    "wanda": {"score": "wanda", "keep_first": 1, "keep_last": 0},
    "magnitude": {"score": "magnitude", "keep_first": 1, "keep_last": 1, "calibration": ("builtin",)},
    "random": {"method": "random", "keep_first": 0, "keep_last": 1, "calibration": ("builtin",)},
    "taylor": {"score": "taylor", "keep_first": 1, "keep_last": 0},
    "taylor-no-refit": {"score": "taylor", "keep_first": 2, "keep_last": 1, "refit": False},
    "sparsegpt": {"method": "semi", "score": "sparsegpt"},
    "masks": {"method": "unstructured", "score": "wanda"},
    "flap": {"score": "flap", "keep_first": 1, "keep_last": 0},
    "depth": {"method": "depth", "keep_first": 1, "keep_last": 0},
}


def options(out: Path, name: str, **changes: Any) -> PruneOptions:
    plain = {"model": str(FIXTURE), "out": str(out), "samples": 4, "length": 32}
    return PruneOptions(**{**plain, **HOW[name], **changes})


def contents(out: Path) -> dict[str, bytes]:
    """All files but the log; the manifest without where things are."""
    found = {file.name: file.read_bytes() for file in out.iterdir() if file.name not in ("loram.log", "loram.json")}
    manifest = json.loads((out / "loram.json").read_text())
    manifest["options"].pop("out")
    manifest["base"].pop("location")
    return found | {"loram.json": json.dumps(manifest).encode()}


def assert_clean(out: Path) -> None:
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert not [path.name for path in out.iterdir() if path.is_dir()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a way of pruning writes when nobody stops it; made once."""
    place = tmp_path_factory.mktemp("undisturbed")

    def made(name: str) -> dict[str, bytes]:
        out = place / name / "out"
        if not out.exists():
            prune(options(out, name))
        return contents(out)

    return made


class Stop(Progress):
    """Sends this process a signal after so many steps of a piece of work."""

    def __init__(self, label: str, after: int, number: int = signal.SIGTERM) -> None:
        self.wanted, self.left, self.number = label, after, number
        self.labels: list[str] = []

    def begin(self, label: str, total: int) -> None:
        self.labels.append(label)

    def advance(self, amount: int = 1, **figures: float) -> None:
        if self.labels[-1].startswith(self.wanted):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)

    def end(self) -> None:
        self.labels.pop()


@pytest.mark.parametrize("memory", ["0", "1KiB"])
@pytest.mark.parametrize("name", [*HOW])
def test_spilled_hidden_states_change_no_byte(name: str, memory: str, undisturbed: Any, tmp_path: Path) -> None:
    prune(options(tmp_path / "out", name, hidden_memory=memory))
    assert contents(tmp_path / "out") == undisturbed(name)
    assert_clean(tmp_path / "out")


def test_hidden_states_are_spilled_beside_out_when_they_outgrow_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[Any] = []
    real = hidden.Hidden.__init__

    def noted(self: Any, shape: Any, dtype: Any, file: Path | None = None) -> None:
        files.append(file)
        real(self, shape, dtype, file)

    monkeypatch.setattr(hidden.Hidden, "__init__", noted)
    prune(options(tmp_path / "out", "wanda"))
    assert files == [None]
    files.clear()
    prune(options(tmp_path / "out", "wanda", hidden_memory="0", force=True))
    assert [file is not None and file.is_relative_to(tmp_path / "out.partial") for file in files] == [True]
    with pytest.raises(OptionError, match="--hidden-memory is 'much'; expected a size such as 24GiB"):
        options(tmp_path / "out", "wanda", hidden_memory="much")


@pytest.mark.parametrize("memory", ["2GiB", "0"])
@pytest.mark.parametrize(
    ("name", "label", "step"),
    [
        ("wanda", "score", 1),
        ("wanda", "score", LAYERS),
        ("wanda", "cut", 2),
        ("magnitude", "score", 2),
        ("random", "score", 3),
        ("taylor", "score", 2),  # on the way there
        ("taylor", "score", LAYERS + 2),
        ("taylor-no-refit", "score", LAYERS),
        ("sparsegpt", "sparsegpt", 1),
        ("sparsegpt", "sparsegpt", 3),
        ("sparsegpt", "cut", 1),
        ("masks", "wanda", 2),
        ("flap", "score", 2),
        ("depth", "influence", 2),
        ("depth", "refit", 1),
    ],
)
def test_a_signal_saves_and_the_continuation_is_exact(
    name: str, label: str, step: int, memory: str, undisturbed: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    chosen = options(out, name, hidden_memory=memory)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM ") as caught:
        prune(chosen, Stop(label, step))
    assert caught.value.exit_code == 75
    assert str(caught.value).endswith(f"go on with `{command_line('prune', chosen)}`")
    assert not out.exists()
    prune(chosen)
    assert contents(out) == undisturbed(name)
    assert_clean(out)


def signalling(prune_block: Any, number: int) -> Any:
    """Sends this process a signal in the middle of the third block."""

    def block(work: Any, block: Any, folder: Path) -> None:
        if block.number == 2:
            os.kill(os.getpid(), number)
        prune_block(work, block, folder)

    return block


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_blocks_that_are_done_are_not_done_again(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written: list[str] = []
    real = Steps.writing

    def noted(self: Steps, name: str) -> Any:
        written.append(name)
        return real(self, name)

    monkeypatch.setattr(Steps, "writing", noted)
    monkeypatch.setattr(resuming, "SHARE", 10**9)  # after the first time, only a signal saves hidden states
    with monkeypatch.context() as patch:
        patch.setattr(sparsify, "prune_block", signalling(sparsify.prune_block, number))
        with pytest.raises(Interrupted, match="behind 3 layers that are done, which are saved"):
            prune(options(tmp_path / "out", "sparsegpt"))
    assert written == ["block-0000", "input-0001", "block-0001", "block-0002", "input-0003"]
    written.clear()
    with caplog.at_level("INFO"):
        prune(options(tmp_path / "out", "sparsegpt"))
    assert written == ["block-0003"]
    assert "going on behind 3 layers that are done" in caplog.text


def test_what_is_saved_on_taylors_way_there_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Interrupted, match="behind 3 layers of the way there, which are saved"):
        prune(options(tmp_path / "out", "taylor"), Stop("score", 3))
    with caplog.at_level("INFO"):
        prune(options(tmp_path / "out", "taylor"))
    assert "going on behind 3 layers of the way there" in caplog.text


def test_another_calibration_is_refused_and_never_starts_anew(undisturbed: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        prune(options(out, "wanda"), Stop("score", 2))
    before = sorted(path.name for path in (tmp_path / "out.partial" / "checkpoints").iterdir())
    text = tmp_path / "task.txt"
    text.write_text("In the beginning God created the heaven and the earth. " * 60)
    message = (
        r"holds a calibration of 2 layers that is not this one: --ratio was 0\.5 and is 0\.25 now; .*--resume never"
    )
    with pytest.raises(OptionError, match=message):
        prune(options(out, "wanda", ratio="0.25"))
    with pytest.raises(OptionError, match="the calibration text is not the same"):
        prune(options(out, "wanda", calibration=("builtin", str(text))))
    assert sorted(path.name for path in (tmp_path / "out.partial" / "checkpoints").iterdir()) == before
    prune(options(out, "wanda", hidden_memory="0", base_id="a/b"))  # what changes nothing may change
    out.rename(tmp_path / "aside")
    with pytest.raises(Interrupted):
        prune(options(out, "wanda", ratio="0.25"), Stop("score", 2))
    prune(options(out, "wanda", resume="never"))
    assert contents(out) == undisturbed("wanda")
    with pytest.raises(OptionError, match="--resume is 'somewhere'; expected one of auto, never"):
        options(out, "wanda", resume="somewhere")


def test_what_is_finished_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    prune(options(out, "masks"))
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    with caplog.at_level("INFO"):
        prune(options(out, "masks"))
    assert "is finished already; to prune it anew add --force" in caplog.text
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
    for changes in ({"ratio": "0.6"}, {"resume": "never"}):
        with pytest.raises(OutputError, match="exists and is not empty"):
            prune(options(out, "masks", **changes))


@pytest.mark.parametrize("how", [{"score": "magnitude"}, {"method": "unstructured", "score": "magnitude"}], ids=str)
def test_without_text_there_is_nothing_to_save(how: dict[str, Any], tmp_path: Path) -> None:
    keep = {} if "method" in how else {"keep_first": 1, "keep_last": 1}
    chosen = PruneOptions(model=str(FIXTURE), out=str(tmp_path / "out"), **how, **keep)
    with pytest.raises(Interrupted, match="before anything was done that could be saved; go on with `loram prune"):
        prune(chosen, Stop("score", 1))
    prune(chosen)
    assert_clean(tmp_path / "out")


def test_random_units_stop_as_well(tmp_path: Path) -> None:
    chosen = PruneOptions(model=str(FIXTURE), out=str(tmp_path / "out"), method="random", keep_first=1, keep_last=1)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM .*go on with `loram prune"):
        streamed(chosen, Stop("cut", 2))
    streamed(chosen)
    assert_clean(tmp_path / "out")


def test_run_goes_on_in_the_middle_of_prune(undisturbed: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "prune: {method: semi, score: sparsegpt, samples: 4, length: 32, calibration: [], hidden_memory: 0}"
    )
    chosen = RunOptions(recipe=str(recipe), model=str(FIXTURE), out=str(tmp_path / "run"))
    with pytest.raises(
        Interrupted, match=r"prune stopped by SIGTERM behind 2 layers that are done.*; go on with `loram run "
    ):
        run(chosen, Stop("sparsegpt", 2))
    run(chosen)
    found, expected = contents(tmp_path / "run" / "prune"), undisturbed("sparsegpt")
    for name in expected.keys() - {"loram.json"}:
        assert found[name] == expected[name], name
    assert not list((tmp_path / "run").glob("prune.*"))


@pytest.mark.parametrize("where", ["spill", "step", "weights"])
def test_a_full_disk_is_one_sentence_and_costs_no_block(
    where: str, undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "out", [0]

    def full(after: int, real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] > after:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **named)

        return call

    target, after = {
        "spill": ((hidden.os, "pwrite"), 3),
        "step": ((hidden.Hidden, "save"), 1),
        "weights": ((Steps, "writing"), 5),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(resuming, "SHARE", 1)
        patch.setattr(*target, full(after, getattr(*target)))
        with pytest.raises(ResourceError, match=r"the disk is full while writing .*out; free some space"):
            prune(options(out, "sparsegpt", hidden_memory="0"))
    assert not out.exists()
    prune(options(out, "sparsegpt", hidden_memory="0"))
    assert contents(out) == undisturbed("sparsegpt")
    assert_clean(out)


def test_numbers_that_went_wrong_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise MismatchError("NaN")

    with pytest.raises(Interrupted):
        prune(options(tmp_path / "out", "wanda"), Stop("score", 2))
    monkeypatch.setattr("loram.stages.choosing.Refit.of", broken)
    with pytest.raises(MismatchError):
        prune(options(tmp_path / "out", "wanda"))
    assert not list(tmp_path.iterdir())


# ---- real kills ----


def killed(tmp_path: Path, names: list[str], points: int) -> dict[str, dict[str, int]]:
    chosen = {}
    for name in names:
        body = options(Path("x"), name).to_json()
        body.pop("out")
        chosen[name] = body | {"hidden_memory": "0" if name == "masks" else "2GiB"}
    driver = [
        sys.executable,
        str(Path(__file__).with_name("killing.py")),
        str(tmp_path),
        json.dumps(chosen),
        str(points),
    ]
    done = subprocess.run(driver, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


def test_killed_in_the_middle_of_it(tmp_path: Path) -> None:
    for figures in killed(tmp_path, ["wanda", "taylor", "sparsegpt", "masks"], 3).values():
        assert figures["went_on"] >= 3, figures


@pytest.mark.slow
@pytest.mark.timeout(1200)  # some ways have many operations, and each kill is a process
@pytest.mark.parametrize("name", [*HOW])
def test_killed_at_every_file_operation(name: str, tmp_path: Path) -> None:
    figures = killed(tmp_path, [name], 0)[name]
    assert figures["moments"] == figures["operations"]
    assert figures["went_on"] > figures["moments"] / 3


def test_the_command_line_ends_with_75_and_what_to_type(tmp_path: Path, undisturbed: Any) -> None:
    chosen = options(tmp_path / "out", "taylor", samples=32, length=64)
    command = [sys.executable, "-m", "loram_cli", *command_line("prune", chosen).split()[1:]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(6000):
        if list((tmp_path / "out.partial" / "checkpoints").glob("input-*/checksums.json")):
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate()
    if process.returncode == 0:
        pytest.skip("it was finished before the signal came")
    assert process.returncode == 75, said
    assert f"go on with `{command_line('prune', chosen)}`" in " ".join(said.split())
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    prune(options(tmp_path / "whole", "taylor", samples=32, length=64))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
