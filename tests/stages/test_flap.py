"""prune --score flap: score, bias and affine refit against whole stock models; the bias stays in the small model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stock_models import LAYERS, MLP, VARIANTS, cut_by_hand, kv_heads, make, raw_config, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

import loram
import loram.stages.prune as stage
from loram.artifact import read_manifest
from loram.errors import MismatchError, OptionError
from loram.modeling import load_small
from loram.options import PlanOptions, PruneOptions
from loram.pruning.flap import compensation
from loram.pruning.refit import DAMPING
from loram.pruning_map import PruningMap, read_map
from loram.stages.plan import plan
from loram.stages.prune import prune

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
WINDOWS = tokens(21, rows=6, length=24)
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Calibration without a tokenizer: the same random tokens for every stock model."""
    monkeypatch.setattr(stage, "calibration", lambda options, folder: WINDOWS)
    return WINDOWS


def options(large: Path, out: Path, **changes: Any) -> PruneOptions:
    cut = {"score": "flap", "keep_first": 1, "keep_last": 0}
    return PruneOptions(**{"model": str(large), "out": str(out), **cut, **changes})


def watched(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of every o and down on the windows: {module: (tokens, features)}, fp64."""
    seen = {}

    def watch(module: str) -> Callable[..., None]:
        def hook(_: Any, inputs: Any, output: Tensor) -> None:
            seen[module] = inputs[0].detach().flatten(0, -2).double(), output.detach().flatten(0, -2).double()

        return hook

    for module, found in model.named_modules():
        if module.endswith(("o_proj", "down_proj")):
            found.register_forward_hook(watch(module))
    with torch.no_grad():
        model(WINDOWS, use_cache=False)
    return seen


def columns(pruning_map: PruningMap, name: str, layer: int, leaf: str) -> Tensor:
    """The input features of o or down that stay."""
    unit, size = ("kv_heads", kv_heads(name)) if leaf == OUTPUTS[0] else ("mlp", MLP)
    axis = pruning_map.axes.get(f"layers.{layer}.{unit}")
    width = make(name).get_submodule(f"model.layers.{layer}.{leaf}").weight.shape[1] // size
    kept = range(size) if axis is None else axis.kept.tolist()
    return torch.tensor([unit * width + row for unit in kept for row in range(width)])


def kept_units(name: str, folder: Path) -> dict[int, tuple[list[int], list[int]]]:
    found = read_map(folder).axes

    def kept(layer: int, unit: str, size: int) -> list[int]:
        axis = found.get(f"layers.{layer}.{unit}")
        return list(range(size)) if axis is None else axis.kept.tolist()

    return {n: (kept(n, "kv_heads", kv_heads(name)), kept(n, "mlp", MLP)) for n in range(LAYERS)}


def compare(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.usefixtures("windows")
def test_against_the_whole_model(name: str, refit: bool, stock: Callable[[str], Path], tmp_path: Path) -> None:
    small = tmp_path / "small"
    result = prune(options(stock(name), small, refit=refit))
    large = make(name)
    state, seen, pruning_map = load_file(stock(name) / "model.safetensors"), watched(large), read_map(small)
    units = kept_units(name, small)
    found, plain = load_file(small / "model.safetensors"), cut_by_hand(name, state, units)
    expected: dict[str, Tensor] = {}
    for layer in (1, 2):
        for number, leaf in enumerate(OUTPUTS):
            module, total = f"model.layers.{layer}.{leaf}", (kv_heads(name), MLP)[number]
            kept, weight = (
                columns(pruning_map, name, layer, leaf),
                state[f"model.layers.{layer}.{leaf}.weight"].double(),
            )
            x, mean = seen[module][0], seen[module][0].mean(0)
            score = (x.var(0) * weight.square().sum(0)).reshape(total, -1).sum(1)
            count = max(total // 2, 1)
            assert units[layer][number] == score.topk(count).indices.sort().values.tolist()
            if count == total:
                continue
            repaired = weight[:, kept]
            if refit:
                inner, right = (x - mean)[:, kept], (x - mean) @ weight.T
                penalty = (DAMPING * inner.square().sum(0).mean()).sqrt() * torch.eye(len(kept), dtype=torch.float64)
                padding = torch.zeros(len(kept), weight.shape[0], dtype=torch.float64)
                rows = torch.cat([inner, penalty]), torch.cat([right, padding])
                repaired = torch.linalg.lstsq(*rows).solution.T
            expected[f"{module}.weight"] = repaired
            expected[f"{module}.bias"] = weight @ mean - repaired @ mean[kept] + state.get(f"{module}.bias", 0)
    assert found.keys() == plain.keys() | expected.keys()
    for key, value in found.items():
        if key in expected:
            assert compare(value, expected[key]) < (2e-4 if refit else 1e-5), key
        else:
            assert torch.equal(value, plain[key]), key
    added = {key for key in expected if key.endswith(".bias")} - plain.keys()
    config = raw_config(small)
    biased = {
        f"model.layers.{n}.{leaf}.bias" for leaf, layers in config.get("loram_biases", {}).items() for n in layers
    }
    assert biased == added
    assert result.small == sum(value.numel() for value in found.values())
    planned = plan(PlanOptions(model=str(stock(name)), score="flap", keep_first=1, keep_last=0))
    assert planned.small.total == result.small
    manifest = read_manifest(small)
    assert manifest is not None
    assert manifest.compression == ("axes", *(["refit"] if refit else []), "bias")


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.endswith("mqa")])
@pytest.mark.usefixtures("windows")
def test_outputs_have_the_large_models_means(
    name: str, refit: bool, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    """In the first layer that is cut, whose attention reads what the large one reads."""
    prune(options(stock(name), tmp_path / "small", refit=refit))
    module = f"model.layers.1.{OUTPUTS[0]}"
    wanted = watched(make(name))[module][1].mean(0)
    found = watched(load_small(tmp_path / "small", dtype="fp32").eval())[module][1].mean(0)
    assert compare(found, wanted) < 1e-4
    model: Any = load_small(tmp_path / "small", dtype="fp32")
    model.get_submodule(module).bias.data.zero_()
    assert compare(watched(model.eval())[module][1].mean(0), wanted) > 1e-2


@pytest.mark.usefixtures("windows")
def test_layers_cut_alike_have_a_class_of_ours_only_for_their_biases(
    stock: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, ours in (("llama-gqa", True), ("qwen2-mha", True), ("llama-mha", False)):
        prune(options(stock(name), tmp_path / name, keep_first=0))
        assert raw_config(tmp_path / name)["model_type"] == ("loram_" if ours else "") + VARIANTS[name][0]
        loram.register()
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert all(layer.self_attn.o_proj.bias is not None for layer in model.model.layers)
        assert all(layer.mlp.down_proj.bias is not None for layer in model.model.layers)


def test_the_bias_of_a_weight_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
    mean, kept = torch.tensor([10.0, 5.0, 2.0]), torch.tensor([0])
    assert compensation(weight, weight[:, kept], mean, kept).tolist() == [16.0, 3.0]
    assert compensation(weight, torch.tensor([[2.0], [1.0]]), mean, kept).tolist() == [6.0, -7.0]


# ---- the pipeline ----


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """large, and a few rows to train on."""
    folder = tmp_path_factory.mktemp("flap")
    shutil.copytree(FIXTURE, folder / "large")
    rows = [{"prompt": f"And the LORD said {number} ", "completion": "unto Moses"} for number in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


CUT: dict[str, Any] = {"score": "flap", "keep_first": 1, "keep_last": 1, "samples": 8, "length": 32}


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_the_bias_ends_in_no_adapter_and_no_merged_model(quantize: str, work: Path, tmp_path: Path) -> None:
    loram.prune(work / "large", out=tmp_path / "small", quantize=quantize, **CUT)
    biases = {name for name in load_file(tmp_path / "small" / "model.safetensors") if name.endswith("_proj.bias")}
    assert biases == {f"model.layers.{n}.{leaf}.bias" for n in (1, 2) for leaf in OUTPUTS}
    train = {"steps": 4, "lr": 2e-3, "dtype": "fp32", "batch": 4, "dropout": 0.0}
    loram.train(tmp_path / "small", data=work / "data.jsonl", out=tmp_path / "trained", **train)
    loram.recover(tmp_path / "trained", out=tmp_path / "adapter")
    checked: Any = loram.verify(tmp_path / "adapter", numeric=True, large=work / "large", small=tmp_path / "small")
    assert checked.ok, checked.summary()
    assert "identity" in {check.name for check in checked.checks}
    for folder in ("trained", "adapter"):
        stored = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in stored)
        assert json.loads((tmp_path / folder / "adapter_config.json").read_text())["bias"] == "none"
    loram.merge(tmp_path / "adapter", out=tmp_path / "merged", base=work / "large")
    merged, large = (load_file(place / "model.safetensors") for place in (tmp_path / "merged", work / "large"))
    assert merged.keys() == large.keys()
    measured: Any = loram.evaluate(tmp_path / "small", data=work / "data.jsonl", adapter=tmp_path / "trained", limit=4)
    assert measured.to_json()["loss"] > 0


def test_quantizing_later_keeps_the_biases(work: Path, tmp_path: Path) -> None:
    loram.prune(work / "large", out=tmp_path / "small", **CUT)
    loram.quantize(tmp_path / "small", out=tmp_path / "later")
    loram.prune(work / "large", out=tmp_path / "once", quantize="nf4", **CUT)
    later, once = (load_file(tmp_path / place / "model.safetensors") for place in ("later", "once"))
    assert later.keys() == once.keys()
    assert all(torch.equal(value, once[name]) for name, value in later.items())


@pytest.mark.parametrize("method", ["distill", "refit", "block"])
def test_aligning_keeps_the_biases(method: str, work: Path, tmp_path: Path) -> None:
    loram.prune(work / "large", out=tmp_path / "small", **CUT)
    how: dict[str, Any] = {"length": 32, "held_out": 4, "large": work / "large"}
    how |= {"samples": 4} if method == "refit" else {"steps": 2, "batch": 2}
    result: Any = loram.align(tmp_path / "small", out=tmp_path / "aligned", method=method, **how)
    assert result.after > 0
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("small", "aligned"))
    assert before.keys() == after.keys()
    assert load_small(tmp_path / "aligned").get_submodule("model.layers.1.mlp.down_proj").bias is not None


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "semi"}, "--score flap measures whole heads and channels; with --method semi use one of"),
        ({"method": "depth"}, "--score flap measures whole heads and channels; with --method depth"),
    ],
)
def test_flap_is_of_units(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PruneOptions(**{"model": "m", "score": "flap", **changes})


@pytest.mark.usefixtures("windows")
def test_nan_in_the_base(tmp_path: Path) -> None:
    model = make("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[1, 1] = float("nan")
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(MismatchError, match="NaN or Inf"):
        prune(options(tmp_path / "large", tmp_path / "small"))
    assert not (tmp_path / "small").exists()
