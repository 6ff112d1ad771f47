"""prune --method depth: influence and refit against whole stock models, and the pipeline behind it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from stock_models import GROUPED, LAYERS, VARIANTS, make, raw_config, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

import loram
import loram.stages.prune as stage
from loram.artifact import read_manifest
from loram.errors import MismatchError, OptionError
from loram.options import PlanOptions, PruneOptions, RunOptions
from loram.pruning.refit import DAMPING
from loram.pruning.selection import layers_left
from loram.pruning_map import read_map
from loram.stages.plan import plan
from loram.stages.prune import prune
from loram.stages.run import run

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
WINDOWS = tokens(21, rows=6, length=24)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Calibration without a tokenizer: the same random tokens for every stock model."""
    monkeypatch.setattr(stage, "calibration", lambda options, folder: WINDOWS)
    return WINDOWS


def options(large: Path, out: Path, **changes: Any) -> PruneOptions:
    cut = {"method": "depth", "keep_first": 0, "keep_last": 0, "ratio": "1/3"}
    return PruneOptions(**{"model": str(large), "out": str(out), **cut, **changes})


def streams(model: Any, windows: Tensor = WINDOWS) -> list[Tensor]:
    """The input of every layer and the output of the last, (N, T, hidden)."""
    outputs: list[Tensor] = []

    def hook(_: Any, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(hook) for layer in model.model.layers]
    with torch.no_grad():
        first = model(windows, use_cache=False, output_hidden_states=True).hidden_states[0]
    for handle in handles:
        handle.remove()
    return [first, *outputs]


def by_hand(model: Any, dropped: tuple[int, ...], windows: Tensor = WINDOWS) -> Tensor:
    """Logits of the stock model where these layers add nothing to what they read."""
    for layer in dropped:
        for part in (model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp.down_proj):
            for parameter in part.parameters():
                torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        found: Tensor = model(windows, use_cache=False).logits
    return found


# ---- which layers go ----


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.usefixtures("windows")
def test_influence_is_that_of_a_whole_model_pass(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    result = prune(options(stock(name), tmp_path / "small"))
    states = streams(make(name))
    expected = []
    for x, y in pairwise(state.double() for state in states):
        expected.append(1 - float(((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean()))
    assert result.influences == pytest.approx(expected, rel=1e-5, abs=1e-7)
    gone = min(range(LAYERS), key=lambda layer: expected[layer])
    kept = tuple(layer for layer in range(LAYERS) if layer != gone)
    assert result.layers == read_map(tmp_path / "small").layers == kept
    assert f"1 of 3 layers went: {gone} " in result.summary()
    body = result.to_json()
    assert body["layers"] == list(kept)
    assert json.loads(json.dumps(body)) == body


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.usefixtures("windows")
def test_what_is_left_is_a_stock_model(name: str, refit: bool, stock: Callable[[str], Path], tmp_path: Path) -> None:
    result = prune(options(stock(name), tmp_path / "small", refit=refit))
    assert result.layers is not None
    (gone,) = set(range(LAYERS)) - set(result.layers)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert type(model).__name__ == type(make(name)).__name__
    assert (result.small, result.large) == (model.num_parameters(), make(name).num_parameters())
    with torch.no_grad():
        found = model(WINDOWS, use_cache=False).logits
    gap = (found - by_hand(make(name), (gone,))).abs().max() / found.abs().max()
    mends = refit and not name.startswith("gemma3") and gone > 0
    assert (gap > 1e-3) if mends else (gap < 1e-5)
    manifest = read_manifest(tmp_path / "small")
    assert manifest is not None
    assert manifest.compression == ("depth", *(["refit"] if mends else []))
    gemma = name.startswith("gemma3")
    assert ("nothing was refitted: a norm follows down" in result.summary()) == (refit and gemma)
    assert manifest.options["score"] == "influence"
    planned = plan(PlanOptions(model=str(stock(name)), method="depth", keep_first=0, keep_last=0, ratio="1/3"))
    assert (planned.large.total, planned.small.total) == (result.large, result.small)


@pytest.mark.usefixtures("windows")
def test_first_and_last_layers_are_left_alone(stock: Callable[[str], Path], tmp_path: Path) -> None:
    for keep, gone in (((1, 1), {1}), ((2, 0), {2}), ((0, 2), {0})):
        cut: dict[str, Any] = {"keep_first": keep[0], "keep_last": keep[1], "ratio": "0.9"}
        result = prune(options(stock("llama-gqa"), tmp_path / str(keep), **cut))
        assert set(range(LAYERS)) - set(result.layers or ()) == gone
        assert len(result.influences) == LAYERS - keep[1]


def test_among_equals_the_first_stay() -> None:
    assert layers_left([0.5, 0.2, 0.2, 0.2, 0.9], range(1, 4), 2, 5) == (0, 1, 4)
    assert layers_left([0.1, 0.4, 0.3], range(3), 1, 3) == (1, 2)


# ---- the refit ----


def deep(folder: Path) -> Path:
    """A stock Llama of six layers with random weights."""
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dropped", [(1, 3, 4), (0, 3), (0, 1), (4, 5), (2, 3, 5)])
@pytest.mark.usefixtures("windows")
def test_each_down_before_a_gap_takes_over_what_the_gap_added(
    dropped: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With whole models in memory: ridge least squares, gap after gap, the small model as repaired so far."""
    large = deep(tmp_path / "large")
    fixed = tuple(0.0 if layer in dropped else 1.0 for layer in range(6))
    monkeypatch.setattr("loram.stages.dropping.influences", lambda *_: fixed)
    how: dict[str, Any] = {"ratio": f"{len(dropped)}/6"}
    prune(options(large, tmp_path / "plain", refit=False, **how))
    prune(options(large, tmp_path / "small", **how))
    targets = streams(AutoModelForCausalLM.from_pretrained(large))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    kept = [layer for layer in range(6) if layer not in dropped]
    changed = set()
    for number, (layer, following) in enumerate(zip(kept, [*kept[1:], 6], strict=True)):
        if following == layer + 1:
            continue
        down, seen = model.model.layers[number].mlp.down_proj, []
        handle = down.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].flatten(0, 1)))
        missing = (targets[following] - streams(model)[number + 1]).flatten(0, 1).double()
        handle.remove()
        x = seen[0].double()
        penalty = (DAMPING * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
        right = torch.cat([missing, torch.zeros(x.shape[1], missing.shape[1], dtype=torch.float64)])
        down.weight.data += torch.linalg.lstsq(torch.cat([x, penalty]), right).solution.T.float()
        changed.add(f"model.layers.{number}.mlp.down_proj.weight")
    found, plain = (load_file(tmp_path / place / "model.safetensors") for place in ("small", "plain"))
    expected = model.state_dict()
    for name, value in found.items():
        if name in changed:
            assert (value - expected[name]).norm() < 1e-4 * expected[name].norm()
            assert (value - plain[name]).norm() > 1e-2 * expected[name].norm()
        else:
            assert torch.equal(value, plain[name])


# ---- the pipeline ----


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """large, and a few rows to train on."""
    folder = tmp_path_factory.mktemp("depth")
    shutil.copytree(FIXTURE, folder / "large")
    rows = [{"prompt": f"And the LORD said {number} ", "completion": "unto Moses"} for number in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


CUT: dict[str, Any] = {"method": "depth", "keep_first": 1, "keep_last": 1, "samples": 8, "length": 32}


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_from_prune_to_merge(quantize: str, work: Path, tmp_path: Path) -> None:
    loram.prune(work / "large", out=tmp_path / "small", quantize=quantize, calibration=("builtin",), **CUT)
    assert raw_config(tmp_path / "small")["num_hidden_layers"] == 3
    train = {"steps": 4, "lr": 2e-3, "dtype": "fp32", "batch": 4, "dropout": 0.0}
    loram.train(tmp_path / "small", data=work / "data.jsonl", out=tmp_path / "trained", **train)
    loram.recover(tmp_path / "trained", out=tmp_path / "adapter")
    checked: Any = loram.verify(tmp_path / "adapter", numeric=True, large=work / "large")
    assert checked.ok, checked.summary()
    assert "identity" in {check.name for check in checked.checks}
    manifest = read_manifest(tmp_path / "adapter")
    assert manifest is not None
    assert manifest.compression == ("depth", "refit", *([] if quantize == "none" else [quantize]))
    kept = read_map(tmp_path / "small").layers
    assert kept is not None
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in stored} == set(kept)
    merged: Any = loram.merge(tmp_path / "adapter", out=tmp_path / "merged", base=work / "large")
    assert merged.path is not None
    after, before = (load_file(place / "model.safetensors") for place in (tmp_path / "merged", work / "large"))
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    (gone,) = set(range(4)) - set(kept)
    assert {name for name in before if f"layers.{gone}." in name} <= same
    assert len(same) < len(before)


def test_a_recipe_drops_aligns_and_trains(work: Path, tmp_path: Path) -> None:
    """Distillation with hidden states needs no layer numbers: it compares what the output head reads."""
    (tmp_path / "recipe.yaml").write_text(
        "prune: {method: depth, ratio: 0.5, keep_first: 1, keep_last: 1, samples: 4, length: 32}\n"
        "align: {method: distill, hidden_weight: 0.5, steps: 12, batch: 2, length: 32, held_out: 4, lr: 2e-3}\n"
        "train: {steps: 3, batch: 2, max_length: 48, lr: 1e-3}\n"
        "recover: {}\nverify: {numeric: true}\neval: {compare: true, max_length: 48}\n"
    )
    data = (str(work / "data.jsonl"),)
    recipe = str(tmp_path / "recipe.yaml")
    result = run(
        RunOptions(recipe=recipe, model=str(work / "large"), data=data, eval_data=data, out=str(tmp_path / "run"))
    )
    assert [made["name"] for made in result.stages] == ["prune", "align", "train", "recover", "verify", "eval"]
    manifest = read_manifest(tmp_path / "run" / "adapter")
    assert manifest is not None
    assert manifest.compression == ("depth", "refit", "aligned")
    align = next(made for made in result.stages if made["name"] == "align")
    assert align["result"]["loss"]["after"] < align["result"]["loss"]["before"]
    assert [row.name for row in result.ladder.rows] == ["base", "small", "small + adapter", "large + recovered"]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_same_call_gives_the_same_bytes(quantize: str, work: Path, tmp_path: Path) -> None:
    for place in ("one", "two"):
        loram.prune(work / "large", out=tmp_path / place, quantize=quantize, **CUT)
    for file in ("model.safetensors", "pruning_map.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_dry_run_says_how_many(work: Path, tmp_path: Path) -> None:
    result: Any = loram.prune(work / "large", out=tmp_path / "small", dry_run=True, **CUT)
    assert "1 of 4 layers will go" in result.summary()
    assert result.path is None
    assert list(tmp_path.iterdir()) == []


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_first": 2, "keep_last": 1}, "--keep-first 2 and --keep-last 1 leave no layer of 3 to drop"),
        ({"ratio": "0.99"}, "--ratio 0.99 leaves no layer of 3; use a smaller ratio"),
    ],
)
def test_nothing_to_drop_and_nothing_left(
    changes: dict[str, Any], message: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        prune(options(stock("llama-gqa"), tmp_path / "small", **changes))
    asked = PlanOptions(model=str(stock("llama-gqa")), method="depth", **{"keep_first": 0, "keep_last": 0, **changes})
    with pytest.raises(OptionError, match=message):
        plan(asked)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"round_to": 64}, "--round-to 64 has no use with --method depth, which drops whole layers; leave it out"),
        ({"pattern": "2:4"}, "--pattern has no use with --method depth"),
        ({"score": "wanda"}, "--score wanda measures .* or single weights; with --method depth use one of influence"),
        ({"score": "taylor"}, "--score taylor measures whole heads and channels; with --method depth"),
        ({"method": "structured", "score": "influence"}, "--score influence measures whole layers"),
        ({"given": "x"}, "--given has no use with --method depth"),
        ({"ratio": "1"}, "--ratio is 1; it must lie strictly between 0 and 1"),
    ],
)
def test_options_that_mean_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PruneOptions(**{"model": "m", "method": "depth", **changes})


@pytest.mark.usefixtures("windows")
def test_nan_in_the_base(tmp_path: Path) -> None:
    model = make("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[1, 1] = float("nan")
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(MismatchError, match="NaN or Inf"):
        prune(options(tmp_path / "large", tmp_path / "small"))
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
