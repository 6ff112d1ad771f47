"""run: sections in order, skipping what is done, going on after a kill, and never past a failure."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loram.artifact import read_manifest
from loram.errors import MismatchError, OptionError, OutputError
from loram.options import RunOptions
from loram.stages.run import RunResult, run

TINY = Path(__file__).parent.parent / "fixtures" / "tiny-llama-kjv"
RECIPE = """
prune: {ratio: 0.5, keep_first: 1, keep_last: 1, samples: 4, length: 32}
train: {steps: 3, batch: 2, max_length: 48, lr: 1e-3}
recover: {}
verify: {numeric: true}
eval: {compare: true, max_length: 48}
"""


@pytest.fixture
def options(tmp_path: Path) -> RunOptions:
    """A run of RECIPE on the tiny model, with a few made-up questions."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for name, count in (("train", 40), ("test", 6)):
        rows = [{"prompt": f"And the number {n} ", "completion": f"was followed by {n + 1}."} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return RunOptions(
        recipe=str(tmp_path / "recipe.yaml"),
        model=str(TINY),
        data=(str(tmp_path / "train.jsonl"),),
        eval_data=(str(tmp_path / "test.jsonl"),),
        out=str(tmp_path / "run"),
    )


def change(options: RunOptions, **values: object) -> RunOptions:
    return RunOptions(**(vars(options) | values))  # type: ignore[arg-type]


def skipped(result: RunResult) -> list[str]:
    return [stage["name"] for stage in result.stages if stage.get("skipped")]


def test_whole_run(options: RunOptions) -> None:
    result = run(options)
    folder = Path(options.out)
    assert [stage["name"] for stage in result.stages] == ["prune", "train", "recover", "verify", "eval"]
    ladder = json.loads((folder / "ladder.json").read_text())
    assert [row["name"] for row in ladder["rows"]] == ["base", "small", "small + adapter", "large + recovered"]
    assert {"name", "loss", "stderr", "accuracy"} <= set(ladder["rows"][0])
    kinds = {name: read_manifest(folder / name) for name in ("prune", "train", "adapter")}
    assert [m.kind for m in kinds.values() if m] == ["small-model", "small-adapter", "adapter"]
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.kind == "run"
    # Half of the calibration is the user's own text without being asked for.
    prune = next(stage for stage in result.stages if stage["name"] == "prune")
    assert prune["options"]["calibration"] == [*options.data, "builtin=1"]
    assert result.ladder.verdict() in result.summary()
    stages = {stage["name"]: stage for stage in json.loads((folder / "run.json").read_text())["stages"]}
    assert all(stage["peak_bytes"] > 0 for stage in stages.values())
    assert stages["train"]["predicted_bytes"] == stages["train"]["result"]["predicted_bytes"] > 0
    assert result.summary().count(" predicted)") == 1


def test_second_time_everything_is_skipped(options: RunOptions) -> None:
    first = run(options)
    second = run(options)
    assert skipped(second) == ["prune", "train", "recover", "verify", "eval"]
    assert second.ladder.to_json() == first.ladder.to_json()


def test_changed_option_redoes_what_depends_on_it(options: RunOptions) -> None:
    run(options)
    again = run(change(options, overrides=("train.lr=2e-3",)))
    assert skipped(again) == ["prune"]


def test_changed_data_redoes_the_pruning_too(options: RunOptions) -> None:
    run(options)
    data = Path(options.data[0])
    data.write_text(data.read_text() + "\n" + json.dumps({"prompt": "Again ", "completion": "and again."}))
    assert skipped(run(options)) == []


def test_damaged_stage_folder_is_made_anew(options: RunOptions) -> None:
    run(options)
    shutil.rmtree(Path(options.out) / "adapter")
    assert skipped(run(options)) == ["prune", "train", "verify", "eval"]
    assert (Path(options.out) / "adapter" / "adapter_model.safetensors").is_file()


def test_failed_verification_stops_the_run(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loram.stages.verify.TOLERANCE", -1.0)
    with pytest.raises(MismatchError, match="verify failed"):
        run(options)
    assert not (Path(options.out) / "ladder.json").exists()


def test_foreign_folder_is_refused_and_left_alone(options: RunOptions) -> None:
    folder = Path(options.out)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not a run"):
        run(options)
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_recipe_without_a_model(options: RunOptions) -> None:
    with pytest.raises(OptionError, match="--model"):
        run(change(options, model=None))


def test_ceiling_adds_a_rung(options: RunOptions) -> None:
    result = run(change(options, ceiling=True))
    assert [row.name for row in result.ladder.rows][-1] == "ceiling"
    manifest = read_manifest(Path(options.out) / "ceiling")
    assert manifest is not None
    assert manifest.kind == "adapter"


def test_dry_run_writes_nothing(options: RunOptions) -> None:
    result = run(change(options, dry_run=True))
    assert [stage["name"] for stage in result.stages] == ["prune", "train", "recover", "verify", "eval"]
    assert not Path(options.out).exists()


def test_killed_run_goes_on(options: RunOptions) -> None:
    """SIGKILL while it trains: what was finished is kept, the rest is done, and the result is the same."""
    code = (
        f"from loram.stages.run import run; from loram.options import RunOptions; run(RunOptions(**{vars(options)!r}))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    folder = Path(options.out)
    deadline = time.monotonic() + 90
    while not (folder / "prune" / "loram.json").is_file() and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (folder / "prune" / "loram.json").is_file(), "the child never finished pruning"
    result = run(options)
    assert "adapter" in {path.name for path in folder.iterdir()}
    fresh = run(change(options, out=str(folder.with_name("fresh"))))
    assert result.ladder.to_json() == fresh.ladder.to_json()


def test_typed_flags_win_over_the_recipe_even_with_their_default_values(options: RunOptions) -> None:
    """The recipe asks for a ceiling and other seeds; what the user types counts, and what is not typed does not."""
    run_section = f"run: {{ceiling: true, seed: 5, model: {TINY}}}\n"
    sections = RECIPE.replace("{steps: 3,", "{steps: 3, seed: 7, data: other.jsonl,")
    Path(options.recipe).write_text(run_section + sections)

    def planned(**typed: object) -> dict[str, dict[str, object]]:
        from loram import run as python_run

        result: RunResult = python_run(options.recipe, out=options.out, dry_run=True, **typed)  # type: ignore[assignment]
        return {stage["name"]: stage["options"] for stage in result.stages}

    recipes = planned()
    assert (recipes["prune"]["seed"], recipes["train"]["seed"]) == (5, 7)
    assert recipes["train"]["data"] == ["other.jsonl"]
    assert "ceiling" in recipes
    typed = planned(ceiling=False, seed=0, data=options.data)
    assert (typed["prune"]["seed"], typed["train"]["seed"]) == (0, 0)
    assert typed["train"]["data"] == [*options.data]
    assert "ceiling" not in typed
    both = planned(seed=0, overrides=("train.seed=9",))
    assert (both["prune"]["seed"], both["train"]["seed"]) == (0, 9)


def test_each_stage_works_on_the_small_model_before_it(options: RunOptions) -> None:
    """align reads what prune wrote, train and eval what align wrote; both halves of the text are the run's."""
    recipe = RECIPE.replace("train:", "align: {method: lm, steps: 2, batch: 2, length: 16, held_out: 2}\ntrain:", 1)
    Path(options.recipe).write_text(recipe)
    planned = {stage["name"]: stage["options"] for stage in run(change(options, dry_run=True)).stages}
    run_folder = Path(options.out)
    assert planned["align"]["model"] == str(run_folder / "prune")
    assert planned["align"]["data"] == planned["prune"]["calibration"] == [*options.data, "builtin=1"]
    assert planned["train"]["model"] == planned["eval"]["small"] == str(run_folder / "align")
    result = run(options)
    assert [stage["name"] for stage in result.stages][:3] == ["prune", "align", "train"]
    manifest = read_manifest(run_folder / "train")
    assert manifest is not None
    assert manifest.compression == ("axes", "refit", "aligned")
    assert skipped(run(options)) == ["prune", "align", "train", "recover", "verify", "eval"]


def test_quantizing_stands_between_pruning_and_training(options: RunOptions) -> None:
    Path(options.recipe).write_text(RECIPE.replace("train:", "quantize: {type: nf4}\ntrain:", 1))
    run_folder = Path(options.out)
    result = run(options)
    assert [stage["name"] for stage in result.stages] == ["prune", "quantize", "train", "recover", "verify", "eval"]
    planned = {stage["name"]: stage["options"] for stage in result.stages}
    assert planned["quantize"]["model"] == str(run_folder / "prune")
    assert planned["train"]["model"] == planned["eval"]["small"] == str(run_folder / "quantize")
    manifest = read_manifest(run_folder / "train")
    assert manifest is not None
    assert manifest.compression == ("axes", "refit", "nf4")
    assert len(skipped(run(options))) == 6
    other = run(change(options, overrides=("quantize.type=int8",)))
    assert skipped(other) == ["prune"]


def test_a_recipe_may_quantize_the_whole_model(options: RunOptions) -> None:
    """Bits before cuts: no pruning at all; and one stage alone finds the small model that the recipe made."""
    without = "quantize: {}\n" + RECIPE.split("\n", 2)[2]
    Path(options.recipe).write_text(without)
    run_folder = Path(options.out)
    planned = {stage["name"]: stage["options"] for stage in run(change(options, dry_run=True)).stages}
    assert planned["quantize"]["model"] == str(TINY)
    assert planned["train"]["model"] == str(run_folder / "quantize")
    alone = run(change(options, dry_run=True, stages=("train",)))
    assert alone.stages[0]["options"]["model"] == str(run_folder / "quantize")
    result = run(options)
    assert result.ladder.rung("large + recovered").loss < result.ladder.rung("base").loss


def test_a_run_may_go_on_on_the_large_model(options: RunOptions) -> None:
    touching = change(options, touch_up=2)
    result = run(touching)
    folder = Path(options.out)
    assert [stage["name"] for stage in result.stages] == ["prune", "train", "recover", "verify", "touch_up", "eval"]
    stage = {each["name"]: each for each in result.stages}
    told = stage["touch_up"]["options"]
    assert (told["steps"], told["lr"], told["streamed"], told["batch"], told["max_length"]) == (2, 2.5e-4, True, 2, 48)
    assert told["adapter"] == str(folder / "adapter")
    assert stage["verify"]["options"]["adapter"] == told["adapter"]
    assert stage["eval"]["options"]["adapter"] == str(folder / "touched")
    assert result.adapter == str(folder / "touched")
    assert "merge" in result.next_command
    assert str(folder / "touched") in result.next_command
    assert skipped(run(touching)) == ["prune", "train", "recover", "verify", "touch_up", "eval"]
    without = run(options)
    assert skipped(without) == ["prune", "train", "recover", "verify"]
    assert without.adapter == str(folder / "adapter")
