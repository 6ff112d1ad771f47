"""The benchmarks: what they count, how they compare, and that the page says what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the checkout's benchmarks are no part of the package

from benchmarks import compare, loops, measure, render, sparse, step, streaming, suite, training, windows  # noqa: E402
from benchmarks.sizes import SIZES, Shape  # noqa: E402
from benchmarks.suite import SUITE, Goal, Outcome  # noqa: E402

SAMPLE = measure.Sample


def entry(size: str = "full") -> dict[str, Any]:
    """A benchmark as it stands in results.json."""
    outcome = Outcome(
        "A title",
        "some setting",
        {"ours": [SAMPLE(1, 2, 300 * 2**20), SAMPLE(3, 4, 500 * 2**20), SAMPLE(2, 3, 400 * 2**20)]},
        [
            Goal("time", 0.2, at_most=0.25),
            Goal("memory", 301, "MiB", at_most=300),
            Goal("gain", 0.96, "", at_least=0.95),
            Goal("for information", 7),
        ],
        {"same bits": True},
    )
    conditions = {
        "size": size,
        "date": "2026-01-01",
        "commit": "abc",
        "command": "python -m benchmarks",
        "machine": "a machine",
        "versions": {"torch": "2"},
    }
    body: dict[str, Any] = json.loads(json.dumps(outcome.to_json() | {"conditions": conditions}))
    return body


def test_the_page_says_what_was_measured() -> None:
    text = render.page({"merge": entry()})
    assert "| time | 0.20× | ≤ 0.25×: met |" in text
    assert "| memory | 301 MiB | ≤ 300 MiB: **missed** |" in text
    assert "| gain | 0.96 | ≥ 0.95: met |" in text
    assert "| for information | 7.00× |  |" in text
    assert "| ours | 2.00 | 3.00 | 400 | 3 |" in text
    assert "Same bits: yes." in text
    assert "`python -m benchmarks` on 2026-01-01, commit `abc`. a machine. torch 2." in text
    assert "smoke run" not in text


def test_a_smoke_run_is_never_judged() -> None:
    text = render.page({"merge": entry("tiny")})
    assert "smoke run" in text
    assert "met" not in text.partition("## A title")[2].replace("title", "")
    assert "missed" not in text


def test_the_terminal_table() -> None:
    lines = render.table({"merge": entry()}).splitlines()
    assert lines[0].split() == ["benchmark", "figure", "measured", "goal"]
    assert lines[2].split() == ["merge", "memory", "301", "MiB", "≤", "300", "MiB:", "missed"]


def test_the_committed_page_is_rendered_from_the_committed_results() -> None:
    results = render.load()
    assert list(results) == [name for name in SUITE if name in results]
    assert results
    assert render.PAGE.read_text(encoding="utf-8") == render.page(results)


def test_contenders_take_turns_and_leave_no_old_output(tmp_path: Path) -> None:
    order = tmp_path / "order"
    out = tmp_path / "out"
    contenders = {
        "first": ["sh", "-c", f"echo first >> {order}; mkdir {out}"],  # fails where the folder is still there
        "second": ["sh", "-c", f"echo second >> {order}"],
    }
    samples = measure.interleaved(contenders, 3, tmp_path, {"first": out})
    assert order.read_text().split() == ["first", "second", "second", "first", "first", "second"]
    assert {name: len(runs) for name, runs in samples.items()} == {"first": 3, "second": 3}


def test_cpu_and_wall_time_are_told_apart(tmp_path: Path) -> None:
    asleep = measure.run(["sleep", "0.3"], tmp_path)
    assert asleep.wall >= 0.3
    assert asleep.cpu < 0.2
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    assert measure.run([sys.executable, "-c", burn], tmp_path).cpu >= 0.3


def test_a_failing_contender_is_not_a_fast_one(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 3:\nno such luck"):
        measure.run(["sh", "-c", "echo no such luck; exit 3"], tmp_path)


def test_the_peak_is_the_childs_own(tmp_path: Path) -> None:
    """A child of a big parent would start at the parent's peak; so the launcher is a process of its own."""
    script = (
        "import sys; from pathlib import Path; from benchmarks.measure import job, run; import benchmarks.__main__\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
        f"print(run(job('floor'), Path({str(tmp_path)!r})).peak, run(['true'], Path({str(tmp_path)!r})).peak)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    floor, nothing = map(int, done.stdout.split())
    assert nothing < 60 * 2**20 < 120 * 2**20 < floor < 600 * 2**20


def test_ratios_are_medians_of_rounds() -> None:
    ours = [SAMPLE(1, 1, 0), SAMPLE(8, 8, 0), SAMPLE(3, 3, 0)]
    theirs = [SAMPLE(2, 2, 0), SAMPLE(2, 2, 0), SAMPLE(4, 4, 0)]
    assert measure.ratio(ours, theirs, "cpu") == 0.75


def test_losses_are_compared_step_by_step() -> None:
    def runs(*losses: list[float]) -> list[measure.Sample]:
        return [SAMPLE(1, 1, 0, {"losses": each}) for each in losses]

    assert suite.loss_gap(runs([3, 2], [3, 2]), runs([3, 2], [3, 2.5])) == 0.5
    with pytest.raises(ValueError, match="shorter"):
        suite.loss_gap(runs([3, 2]), runs([3]))


def test_both_loops_remove_nearly_the_same() -> None:
    """The reference counts a threshold of the whole block and ties among all rows; the rest is the same arithmetic."""
    found = loops.measured(Shape(hidden=64, mlp=96, layers=1, heads=4, kv_heads=2, vocab=50), rounds=2)
    assert set(found) == {"unstructured", "2:4"}
    for figures in found.values():
        assert figures["agree"] > 0.99
        assert len(figures["ours"]) == len(figures["reference"]) == 2


def test_what_imports_take_is_taken_off() -> None:
    ours, theirs = [SAMPLE(3, 0, 0), SAMPLE(5, 0, 0)], [SAMPLE(9, 0, 0), SAMPLE(9, 0, 0)]
    assert sparse.without(ours, theirs, [SAMPLE(1, 0, 0)] * 2, [SAMPLE(5, 0, 0)] * 2) == 0.75


def test_zeros_that_two_checkpoints_share(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    weight = numpy.array([[1, 0, 2, 0], [0, 0, 3, 4]], numpy.float32)
    for folder, value in ((one, weight), (two, weight[:, ::-1].copy())):
        folder.mkdir()
        save_file(
            {"model.layers.0.mlp.up_proj.weight": value, "model.norm.weight": weight}, folder / "model.safetensors"
        )
    assert windows.agreement(one, one) == 1
    assert windows.agreement(one, two) == 0


def test_small_figures_are_not_rounded_to_nothing() -> None:
    goal = Goal("gap", 0.000189, "", at_most=1e-3).to_json()
    assert render.goal_row(goal, True) == "| gap | 2e-04 | ≤ 0.001: met |"
    assert render.spell(0.0, "") == "0.00"


def test_a_job_of_both_trainers_sees_the_same_rows() -> None:
    assert step.token_rows(50, 3, 4) == step.token_rows(50, 3, 4)
    assert {len(row) for row in step.token_rows(50, 3, 4)} == {4}


def test_the_step_is_measured_under_a_real_vocabulary() -> None:
    full = SIZES["full"]
    assert (full.step_batch, full.step_length) == (8, 512)
    assert full.stepped.vocab >= 49_000


def test_compare_finds_one_bit(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    weights = {name: numpy.arange(6, dtype=numpy.float32).reshape(2, 3) for name in ("a", "b", "c")}
    for folder in (one, two):
        folder.mkdir()
    save_file({"a": weights["a"]}, one / "1.safetensors")
    save_file({"b": weights["b"], "c": weights["c"]}, one / "2.safetensors")
    save_file(weights, two / "model.safetensors")
    assert compare.differences(one, two) == []
    changed = weights["b"].copy()
    changed[1, 2] = numpy.nextafter(changed[1, 2], 9)
    save_file(weights | {"b": changed, "c": weights["c"].reshape(3, 2)}, two / "model.safetensors")
    assert compare.differences(one, two) == ["b", "c"]
    save_file({"a": weights["a"], "b": weights["b"]}, two / "model.safetensors")
    assert compare.differences(one, two) == ["c"]


def test_operations_of_a_step_by_hand() -> None:
    shape = Shape(hidden=8, mlp=20, layers=2, heads=4, kv_heads=2, vocab=50)
    whole = 2 * 8 * 8 + 2 * 4 * 8 + 3 * 8 * 20
    lora = 2 * (8 + 8) + 2 * (4 + 8) + 3 * (8 + 20)
    expected = 4 * (2 * whole + 50 * 8) + 6 * 3 * 2 * lora + 2 * 8 * 4 * 16 * 3
    assert training.step_flops(shape.config(), length=16, rank=3) == expected
    cut = shape.config() | {"model_type": "loram_llama", "loram_widths": {"kv_heads": [2, 1], "mlp": [20, 10]}}
    half = 2 * 4 * 8 + 2 * 2 * 8 + 3 * 8 * 10
    thin = 2 * (4 + 8) + 2 * (2 + 8) + 3 * (8 + 10)
    expected = 4 * (whole + half + 50 * 8) + 6 * 3 * (lora + thin) + (8 + 4) * 4 * 16 * 3
    assert training.step_flops(cut, length=16, rank=3) == expected


def test_a_limited_process_is_refused_more_address_space(tmp_path: Path) -> None:
    model = ROOT / "tests" / "fixtures" / "tiny-llama-kjv"
    keep = ("--keep-first", 1, "--keep-last", 1, "--quiet")
    most = 512 * 2**20

    def prune(*how: str) -> measure.Sample:
        return measure.run(
            measure.job("limited", most, "prune", model, *how, *keep, "-o", tmp_path / "-".join(how)), tmp_path
        )

    assert 16 * 2**20 < prune("--method", "random").figures["address_space"] <= most
    with pytest.raises(RuntimeError):  # torch alone takes more
        prune("--score", "magnitude")


def test_time_of_a_layer_is_that_of_those_that_were_added() -> None:
    assert streaming.per_layer([SAMPLE(10, 0, 0)], [SAMPLE(26, 0, 0)], 8) == 2


def test_every_size_has_a_model_that_can_be_cut() -> None:
    assert SIZES["full"].huge.layers == 46
    for size in SIZES.values():
        for shape in (size.checkpoint, size.trained, size.stepped, size.deep, size.huge, size.real):
            assert shape.hidden % shape.heads == 0
            assert shape.heads % shape.kv_heads == 0
            assert shape.kv_heads >= 2
            assert shape.layers > 2
