"""The numbers that prune cuts by, block after block, are those of a whole-model pass; and what is read for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from stock_models import GROUPED, LAYERS, MLP, VARIANTS, head_dim, kv_heads, make, tokens
from torch import Tensor

import loram.stages.prune as stage
from loram.checkpoint import Checkpoint
from loram.errors import MismatchError
from loram.options import PruneOptions
from loram.stages import choosing
from loram.stages.prune import prune

WINDOWS = tokens(21, rows=6, length=24)
Scores = dict[int, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration without a tokenizer: the same random tokens for every stock model."""
    monkeypatch.setattr(stage, "calibration", lambda options, folder: WINDOWS)


def options(large: Path, out: Path, **changes: Any) -> PruneOptions:
    return PruneOptions(**{"model": str(large), "out": str(out), "keep_first": 0, "keep_last": 0, **changes})


def found_scores(large: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Scores:
    """The scores that prune chooses units by, by layer."""
    found: Scores = {}
    real = choosing.layer_axes

    def noted(layer: int, widths: Any, geometry: Any, scores: Mapping[str, Tensor]) -> Any:
        found[layer] = dict(scores)
        return real(layer, widths, geometry, scores)

    monkeypatch.setattr(choosing, "layer_axes", noted)
    prune(options(large, out, **changes))
    return found


def whole_pass(name: str) -> tuple[Any, dict[str, Tensor]]:
    """The whole stock model with the gradients of the summed mean losses, and the inputs of every o and down."""
    model, inputs = make(name), {}
    for path, module in model.named_modules():
        if path.endswith(("o_proj", "down_proj")):
            hook = inputs.setdefault(path, [])
            module.register_forward_pre_hook(lambda _, x, hook=hook: hook.append(x[0].detach().flatten(0, -2)))
    for window in WINDOWS:
        logits = model(window[None], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], window[1:]).backward()
    return model, {path: torch.cat(rows) for path, rows in inputs.items()}


def by_head(name: str, values: Tensor) -> Tensor:
    return values.reshape(kv_heads(name), -1).sum(1)


def importance(score: str, weight: Tensor, gradient: Tensor | None) -> Tensor:
    if score == "magnitude":
        return weight.detach().double().square()
    assert gradient is not None
    return (weight.detach() * gradient).abs().double()


def expected_scores(name: str, score: str) -> Scores:
    """The same by hand: sums over all that belongs to a kv head, or to a channel."""
    model, inputs = whole_pass(name)
    queries = 4 * head_dim(name)
    keys = kv_heads(name) * head_dim(name)
    found: Scores = {}
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        if score == "wanda":
            columns = {}
            for leaf, module in (("self_attn.o_proj", attention.o_proj), ("mlp.down_proj", mlp.down_proj)):
                norms = inputs[f"model.layers.{number}.{leaf}"].double().square().sum(0).sqrt()
                columns[leaf] = (module.weight.detach().double().abs() * norms).sum(0)
            found[number] = {"kv_heads": by_head(name, columns["self_attn.o_proj"]), "mlp": columns["mlp.down_proj"]}
            continue

        def part(module: Any) -> Tensor:
            return importance(score, module.weight, module.weight.grad)

        if VARIANTS[name][0] == "phi3":
            rows = part(attention.qkv_proj).sum(1).split([queries, keys, keys])
            channels = part(mlp.gate_up_proj).sum(1).reshape(2, MLP).sum(0)
        else:
            rows = tuple(part(module).sum(1) for module in (attention.q_proj, attention.k_proj, attention.v_proj))
            channels = part(mlp.gate_proj).sum(1) + part(mlp.up_proj).sum(1)
        heads = sum((by_head(name, value) for value in rows), by_head(name, part(attention.o_proj).sum(0)))
        found[number] = {"kv_heads": heads, "mlp": channels + part(mlp.down_proj).sum(0)}
    return found


@pytest.mark.parametrize("score", ["wanda", "taylor", "magnitude"])
@pytest.mark.parametrize("name", VARIANTS)
def test_scores_are_those_of_a_whole_model_pass(
    name: str, score: str, stock: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = found_scores(stock(name), tmp_path / "small", monkeypatch, score=score)
    expected = expected_scores(name, score)
    assert found.keys() == expected.keys() == set(range(LAYERS))
    for layer, units in expected.items():
        assert found[layer].keys() == units.keys()
        for unit, value in units.items():
            assert ((found[layer][unit] - value).norm() / value.norm()).item() < 1e-5, (layer, unit)


class CountingCheckpoint(Checkpoint):
    """A checkpoint that counts the bytes that are read of each tensor."""

    counts: ClassVar[Counter[str]] = Counter()

    def raw(self, name: str, start: int, stop: int) -> Any:
        self.counts[name] += (stop - start) * self.entry(name).row_bytes
        return super().raw(name, start, stop)


@pytest.mark.parametrize(
    ("how", "times"),
    [
        ({"score": "wanda"}, 1),
        ({"score": "wanda", "refit": False}, 1),
        ({"score": "magnitude"}, 1),
        ({"score": "taylor"}, 2),
        ({"method": "semi", "score": "wanda"}, 1),
        ({"method": "semi", "score": "sparsegpt"}, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", GROUPED)
def test_a_pass_reads_each_weight_of_a_block_once_and_with_gradients_twice(
    name: str, how: dict[str, Any], times: int, stock: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    read: dict[str, Counter[str]] = {}
    real = stage.write_weights

    def before_the_cut(*arguments: Any) -> Any:
        read["pass"] = Counter(CountingCheckpoint.counts)
        return real(*arguments)

    monkeypatch.setattr(CountingCheckpoint, "counts", Counter())
    monkeypatch.setattr(stage, "Checkpoint", CountingCheckpoint)
    monkeypatch.setattr(stage, "write_weights", before_the_cut)
    prune(options(stock(name), tmp_path / "small", **how))
    with Checkpoint(stock(name)) as checkpoint:
        sizes = {key: entry.end - entry.start for key, entry in checkpoint.entries.items() if ".layers." in key}
    assert {key: read["pass"][key] for key in sizes} == {key: times * size for key, size in sizes.items()}


@pytest.mark.parametrize(
    "how",
    [
        {"score": "wanda"},
        {"score": "wanda", "refit": False},
        {"score": "taylor"},
        {"score": "magnitude"},
        {"method": "random"},
        {"method": "semi", "score": "sparsegpt"},
        {"method": "unstructured", "score": "wanda"},
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_one_sentence_and_leave_nothing(how: dict[str, Any], value: float, tmp_path: Path) -> None:
    model = make("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[1, 1] = value
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(
        MismatchError, match=r"layer 1: its output is NaN or Inf|layers\.1\..* (is|holds) NaN or Inf"
    ) as said:
        prune(options(tmp_path / "large", tmp_path / "small", **how))
    assert said.value.exit_code == 6
    assert "\n" not in str(said.value)
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


@pytest.mark.parametrize("method", ["semi", "unstructured"])
def test_inputs_that_are_never_active_leave_no_hessian(method: str, tmp_path: Path) -> None:
    model = make("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.zero_()
    model.save_pretrained(tmp_path / "large")
    message = (
        r"input of model.layers.1.self_attn.q_proj is not positive definite, whatever the damping; .*--calibration"
    )
    with pytest.raises(MismatchError, match=message):
        prune(options(tmp_path / "large", tmp_path / "small", method=method, score="sparsegpt"))
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_units_that_are_never_active_are_cut_and_refitted_all_the_same(tmp_path: Path) -> None:
    model = make("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
        model.model.layers[2].mlp.up_proj.weight[:30].zero_()
    model.save_pretrained(tmp_path / "large")
    prune(options(tmp_path / "large", tmp_path / "small"))
    assert (tmp_path / "small" / "loram.json").is_file()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "how", [{"score": "wanda"}, {"score": "taylor"}, {"method": "semi", "score": "sparsegpt"}], ids=str
)
def test_a_gpu_chooses_as_the_cpu_does(
    how: dict[str, Any], stock: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for kind in ("cuda", "cpu"):
        monkeypatch.setattr("loram.blockwise.runner.pick_device", lambda kind=kind: torch.device(kind))
        prune(options(stock("llama-gqa"), tmp_path / kind, **how))
        found[kind] = (tmp_path / kind / "pruning_map.safetensors").read_bytes()
    same = sum(a == b for a, b in zip(found["cuda"], found["cpu"], strict=True))
    assert same / len(found["cpu"]) > 0.98
