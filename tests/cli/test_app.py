"""The command line from outside: what it answers, where it prints, how it exits, and what it never imports."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import loram.stages
from loram import errors
from loram.options import SECTIONS, StageOptions
from loram.progress import Progress
from loram.results import StageResult

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy")
STAGES = list(SECTIONS)


def main(*arguments: str) -> int:
    (script,) = entry_points(group="console_scripts", name="loram")
    code: int = script.load()(list(arguments))
    return code


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeResult(StageResult):
    ladder: Any = ()
    code: int = 0

    @property
    def exit_code(self) -> int:
        return self.code

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"loss": float("nan"), "rows": len(self.ladder)}

    def summary(self) -> str:
        return "3 of [4] heads kept"


class Fake:
    """Stands where the stages are: records its options and does what the test says."""

    def __init__(self) -> None:
        self.options: Any = None
        self.result = FakeResult(path=Path("small"), next_command="loram train small --data FILE -o adapter")
        self.does: Callable[[Progress], None] = lambda progress: None

    def __call__(self, options: StageOptions, progress: Progress) -> StageResult:
        self.options = options
        self.does(progress)
        return self.result


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(loram.stages, "stage_function", lambda name: fake)
    return fake


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "TERM": "dumb", "COLUMNS": "200", **environment},
    )


QUESTIONS = [
    ["--help"],
    ["--version"],
    ["recipes"],
    ["recipes", "quickstart"],
    *([name, "--help"] for name in [*STAGES, "recipes", "doctor"]),
]
MISTAKES = [
    ["prun", "model"],
    ["prune", "model", "-o", "out", "--rato", "0.5"],
    ["prune", "model", "-o", "out", "--ratio", "abc"],
    ["prune", "model", "-o", "out", "--method", "structred"],
    ["prune", "-o", "out"],
    ["prune", "model"],
    ["prune", "model", "another", "-o", "out"],
    ["prune", "model", "-o", "out", "--set", "rato=0.5"],
    ["prune", "model", "-o", "out", "--set", "ratio"],
    ["prune", "model", "-o", "out", "--recipe", "quickstrat"],
    ["train", "model", "-o", "out", "--steps", "many"],
    ["train", "model", "-o", "out", "--lr"],
    ["run", "quickstart", "-o", "out", "--set", "prune.rato=0.5"],
    ["run", "no-such.yaml", "-o", "out"],
    ["recipes", "quickstrat"],
]

ALL_IN_ONE = f"""
import contextlib, io, json, sys
from loram_cli.app import main
lines = json.loads(sys.argv[1])
codes = []
for line in lines:
    with contextlib.redirect_stdout(io.StringIO()):
        codes.append(main(line))
print(json.dumps([codes, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


def test_help_and_usage_errors_import_nothing_heavy() -> None:
    done = python(ALL_IN_ONE, json.dumps(QUESTIONS + MISTAKES))
    codes, imported = json.loads(done.stdout)
    assert codes == [0] * len(QUESTIONS) + [2] * len(MISTAKES), done.stderr
    assert imported == []
    assert done.stderr.count("error: ") == len(MISTAKES)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("prun model", "error: loram has no command 'prun'; did you mean prune?"),
        ("prune m -o x --rato 1", "error: loram prune has no option --rato; did you mean --ratio?"),
        ("prune m -o x --keep_frist 1", "did you mean --keep-first?"),
        ("train m -o x --max_step 1", "did you mean --steps?"),
        ("prune m -o x --set rato=1", "'rato'; did you mean ratio?"),
        ("prune m -o x --method structred", "did you mean structured?"),
        ("prune m -o x --recipe quickstrat", "did you mean quickstart?"),
        ("run quickstart -o x --set trian.steps=1", "did you mean train?"),
        ("run quickstart -o x --set train.stesp=1", "'stesp'; did you mean steps?"),
        ("prune -o x", "error: loram prune needs MODEL; see `loram prune --help`"),
        ("project -o x", "error: loram project needs ADAPTER and SMALL; see `loram project --help`"),
        ("prune m", "error: loram prune got no output; add -o OUT"),
        ("train m -o x --steps many", "'many' is not a valid integer"),
        ("demo --recipe mine.yaml", "use `loram run RECIPE -o RUN`"),
        ("run a.yaml --recipe b.yaml -o x", "error: two recipes were given, a.yaml and b.yaml; give one"),
        ("train m -o x --steps 3 --max-steps 4", "error: --steps was given twice"),
    ],
)
def test_mistakes_name_what_was_meant(
    line: str, sentence: str, stage: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*line.split()) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert stage.options is None


def test_every_option_has_a_flag_and_its_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    for name, kind in SECTIONS.items():
        assert main(name, "--help") == 0
        text = capsys.readouterr().out
        assert str(kind.__doc__).split()[0] in text
        for item in dataclasses.fields(kind):
            if item.metadata.get("assignments"):
                continue
            shown = item.name.upper() if item.metadata.get("argument") else "--" + item.name.replace("_", "-")
            assert shown in text, f"{name}: {shown}"
            assert str(item.metadata["help"])[:25] in " ".join(text.split()), f"{name}: {item.name}"
            for alias in item.metadata.get("flags", ()):
                assert alias not in text.split(), f"{alias} is an alias and stays hidden"
        for common in ("--recipe", "--set", "--json", "--quiet", "--verbose"):
            assert common in text


def test_flags_reach_the_stage(stage: Fake) -> None:
    line = (
        "prune big -o small --ratio 0.65 --keep_first 1 --no-refit --calibration a.jsonl=2,builtin --calibration b.txt"
    )
    assert main(*line.split()) == 0
    assert stage.options.model == "big"
    assert stage.options.ratio == "0.65"
    assert stage.options.keep_first == 1
    assert stage.options.refit is False
    assert stage.options.calibration == ("a.jsonl=2", "builtin", "b.txt")
    assert stage.options.keep_last == 2


def test_names_of_other_tools_are_accepted(stage: Fake) -> None:
    line = "train m --output_dir out --learning_rate 1e-5 --per_device_train_batch_size 2 --max_steps 7 --use_rslora"
    assert main(*line.split(), "--gradient_checkpointing", "--num-train-epochs", "2") == 0
    options = stage.options
    assert (options.out, options.lr, options.batch, options.steps, options.epochs) == ("out", 1e-5, 2, 7, 2.0)
    assert options.rslora is True
    assert options.checkpointing is True


def test_precedence_is_flag_set_recipe_default(stage: Fake, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("prune: {model: big, ratio: 0.3, keep-first: 3, samples: 5, refit: false}\n")
    line = f"prune --recipe {recipe} -o small --set ratio=0.4 --set keep_first=2 --keep-first 1"
    assert main(*line.split()) == 0
    options = stage.options
    assert (options.model, options.ratio, options.keep_first, options.samples) == ("big", "0.4", 1, 5)
    assert options.refit is False
    assert options.length == 256


def test_run_gets_its_overrides_whole(stage: Fake) -> None:
    assert main("run", "quickstart", "-o", "x", "--set", "train.targets=q_proj,v_proj", "--set", "model=m") == 0
    assert stage.options.recipe == "quickstart"
    assert stage.options.overrides == ("train.targets=q_proj,v_proj", "model=m")


def test_a_flag_typed_with_its_default_is_not_a_flag_left_out(stage: Fake) -> None:
    assert main("run", "quickstart", "-o", "x", "--set", "run.seed=5", "--seed", "0", "--no-ceiling") == 0
    assert stage.options.overrides == ("run.seed=5", "run.ceiling=false", "run.seed=0")


def test_recipe_without_the_section_is_refused(stage: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("merge", "a", "-o", "x", "--recipe", "quickstart") == 2
    assert "the recipe quickstart has no section merge; it has run, prune" in capsys.readouterr().err


def test_the_last_line_is_the_path_and_the_next_command(stage: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("prune", "big", "-o", "small") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["3 of [4] heads kept", "small    next: loram train small --data FILE -o adapter"]
    assert main("prune", "big", "-o", "small", "-q") == 0
    assert capsys.readouterr().out.splitlines() == lines[-1:]


def test_json_is_one_object_on_stdout(stage: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    def work(progress: Progress) -> None:
        sys.stdout.write("a library talks\n")
        logging.getLogger("loram.stages").info("calibrating on %d rows", 3)
        progress.begin("prune", 2)
        progress.advance(2, loss=1.5)
        progress.end()

    stage.does = work
    assert main("prune", "big", "-o", "small", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"path": "small", "loss": None, "rows": 0}
    assert captured.out.count("\n") == 1
    for word in ("a library talks", "calibrating on 3 rows", "prune  2/2", "loss 1.5"):
        assert word in captured.err


def test_quiet_hides_progress_and_information(stage: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    def work(progress: Progress) -> None:
        logging.getLogger("loram.stages").info("not now")
        logging.getLogger("loram.stages").warning("but this")
        progress.begin("prune", 1)
        progress.advance()

    stage.does = work
    assert main("prune", "big", "-o", "small", "-q") == 0
    assert capsys.readouterr().err == "warning: but this\n"
    assert logging.getLogger("loram").handlers == []


def test_the_ladder_is_drawn(stage: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"name": "base", "loss": 2.0, "stderr": 0.01, "accuracy": None},
        {"name": "large + recovered", "loss": 1.0, "stderr": 0.02, "accuracy": None},
    ]
    stage.result = FakeResult(ladder=rows)
    assert main("eval", "big", "--data", "x.txt") == 0
    table = capsys.readouterr().out
    base, recovered = (next(line for line in table.splitlines() if name in line) for name in ("base", "recovered"))
    assert "2.0000" in base
    assert "0.0200" in recovered
    assert recovered.count("█") > base.count("█") > 0


def test_a_result_can_fail(stage: Fake) -> None:
    stage.result = FakeResult(code=6)
    assert main("verify", "adapter") == 6


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (errors.OptionError("bad"), 2, "error: bad"),
        (errors.OutputError("there"), 2, "error: there"),
        (errors.ResourceError("full"), 3, "error: full"),
        (errors.CheckpointError("torn"), 4, "error: torn"),
        (errors.HubError("offline"), 5, "error: offline"),
        (errors.MismatchError("other"), 6, "error: other"),
        (errors.Interrupted("again"), 75, "error: again"),
        (MemoryError(), 3, "error: out of memory"),
        (OutOfMemoryError("CUDA"), 3, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 3, "error: out of memory"),
        (OSError(28, "No space left on device"), 3, "error: the disk is full"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (ValueError("two\nlines"), 1, "error: ValueError: two lines; this is a bug in loram"),
    ],
)
def test_errors_are_one_sentence_and_a_code(
    error: BaseException, code: int, sentence: str, stage: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(progress: Progress) -> None:
        raise error

    stage.does = fail
    assert main("prune", "big", "-o", "small", "--json") == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(sentence)
    assert captured.err.count("\n") == 1
    assert main("prune", "big", "-o", "small", "-v") == code
    assert "Traceback" in capsys.readouterr().err


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("recipes") == 0
    listed = capsys.readouterr().out
    assert main("recipes", "--json") == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["recipes"]]
    assert names == sorted(names)
    for name in names:
        assert name in listed
        assert main("recipes", name) == 0
        assert "run:" in capsys.readouterr().out


def test_doctor_tells_no_secrets() -> None:
    code = "from loram_cli.app import main; raise SystemExit(main(['doctor', '--json']))"
    done = python(code, HF_TOKEN="hf_secret_word")
    report = json.loads(done.stdout)
    assert report["torch"]
    assert report["cpu_cores"] >= 1
    assert "hf_secret_word" not in done.stdout + done.stderr


def test_no_color_and_pipes_are_plain() -> None:
    code = "from loram_cli.app import main; raise SystemExit(main(['prun']))"
    done = python(code, NO_COLOR="1", FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[31m" not in done.stderr
    assert done.returncode == 2
