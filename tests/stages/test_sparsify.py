"""prune of single weights: masks and weights against oracles that run the whole stock model, layer after layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_models import GROUPED, LAYERS, VARIANTS, build, head_dim, leaves, make, raw_config, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

import loram.stages.prune as stage
from loram.artifact import read_manifest
from loram.errors import CheckpointError, KindError, MismatchError, OptionError, OutputError
from loram.families.sparsity import Sparsity, parse_sparsity
from loram.families.widths import parse_ratio
from loram.options import PruneOptions
from loram.pruning.sparsegpt import sparsegpt
from loram.pruning_map import read_map
from loram.stages.prune import PruneResult, prune

WINDOWS = tokens(21, rows=6, length=24)
HOW = [{"method": "semi"}, {"method": "semi", "pattern": "1:4"}, {"method": "unstructured", "ratio": "0.55"}]


def options(large: Path, out: Path, **changes: Any) -> PruneOptions:
    return PruneOptions(**{"model": str(large), "out": str(out), **changes})


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration without a tokenizer: the same random tokens for every stock model."""
    monkeypatch.setattr(stage, "calibration", lambda options, folder: WINDOWS)


def is_linear(tensor: str) -> bool:
    return "_proj.weight" in tensor


def sparsity_of(how: dict[str, Any]) -> Sparsity:
    return parse_sparsity(how.get("pattern", "2:4")) if how["method"] == "semi" else Sparsity(parse_ratio(how["ratio"]))


def lowest(scores: Tensor, sparsity: Sparsity, whole: bool) -> Tensor:
    """What goes by a stable sort: of each group, of the whole weight, or of each row."""
    width = sparsity.group or (scores.numel() if whole else scores.shape[1])
    pieces = scores.reshape(-1, width)
    order = pieces.argsort(dim=1, stable=True)[:, : sparsity.removed(width)]
    return torch.zeros_like(pieces, dtype=torch.bool).scatter_(1, order, True).reshape(scores.shape)


def check_folder(name: str, out: Path, large: dict[str, Tensor], result: PruneResult) -> dict[str, Tensor]:
    """What every such folder must be: same shapes, a mask per Linear that is its non-zeros, loadable as it is."""
    small, pruning_map = load_file(out / "model.safetensors"), read_map(out)
    assert {key: value.shape for key, value in small.items()} == {key: value.shape for key, value in large.items()}
    assert set(pruning_map.masks) == {key for key in large if is_linear(key)}
    assert len(pruning_map.masks) == LAYERS * len(leaves(name))
    for key, value in small.items():
        if is_linear(key):
            assert torch.equal(pruning_map.masks[key].unpack(), value != 0), key
        else:
            assert torch.equal(value, large[key]), key
    manifest = read_manifest(out)
    assert manifest is not None
    assert (manifest.kind, manifest.compression) == ("small-model", ("mask",))
    assert manifest.pruning_map_sha256 == pruning_map.sha256
    assert not (out / "refit").exists()
    parameters = set(dict(make(name).named_parameters()))
    assert result.small == sum(
        int((small[key] != 0).sum()) if is_linear(key) else small[key].numel() for key in parameters
    )
    assert result.large == sum(large[key].numel() for key in parameters)
    return small


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_magnitude(name: str, how: dict[str, Any], stock: Callable[[str], Path], tmp_path: Path) -> None:
    result = prune(options(stock(name), tmp_path / "small", score="magnitude", **how))
    large = load_file(stock(name) / "model.safetensors")
    small = check_folder(name, tmp_path / "small", large, result)
    for key, value in large.items():
        if is_linear(key):
            assert torch.equal(small[key], value.masked_fill(lowest(value.abs(), sparsity_of(how), True), 0)), key
    assert raw_config(tmp_path / "small") == {"head_dim": head_dim(name), **raw_config(stock(name))}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in small.items())


def inputs_of(model: Any, layer: int) -> dict[str, Tensor]:
    """The inputs of one layer's Linears in a forward of the whole model: {leaf: (tokens, in)}."""
    seen: dict[str, Tensor] = {}

    def watch(leaf: str) -> Callable[..., None]:
        def hook(_: Any, inputs: Any) -> None:
            seen[leaf] = inputs[0].detach().reshape(-1, inputs[0].shape[-1])

        return hook

    handles = [
        module.register_forward_pre_hook(watch(path.rpartition(".")[2]))
        for path, module in model.model.layers[layer].named_modules()
        if path.endswith("_proj")
    ]
    with torch.no_grad():
        model(WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def sequential(name: str, prune_one: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """The whole model pruned layer after layer, each from inputs that the pruned layers before it make."""
    model = make(name)
    for layer in range(LAYERS):
        inputs = inputs_of(model, layer)
        with torch.no_grad():
            for path, module in model.model.layers[layer].named_modules():
                if path.endswith("_proj"):
                    module.weight.copy_(prune_one(module.weight, inputs[path.rpartition(".")[2]]))
    return dict(model.state_dict())


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.usefixtures("windows")
def test_wanda_sees_what_the_pruned_layers_do(
    name: str, how: dict[str, Any], stock: Callable[[str], Path], tmp_path: Path
) -> None:
    sparsity = sparsity_of(how)
    result = prune(options(stock(name), tmp_path / "small", score="wanda", **how))
    small = check_folder(name, tmp_path / "small", load_file(stock(name) / "model.safetensors"), result)

    def by_hand(weight: Tensor, x: Tensor) -> Tensor:
        scores = weight.abs() * x.double().square().sum(0).sqrt().float()
        return weight.masked_fill(lowest(scores, sparsity, False), 0)

    expected = sequential(name, by_hand)
    for key, value in small.items():
        if is_linear(key):
            assert (value != 0).sum(1).unique().tolist() == [value.shape[1] - sparsity.removed(value.shape[1])]
            assert ((value != 0) == (expected[key] != 0)).float().mean() > 0.995, key  # fp32 may part near ties


@pytest.mark.parametrize("how", HOW[1:], ids=str)
@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.usefixtures("windows")
def test_sparsegpt_sees_what_the_pruned_layers_do(
    name: str, how: dict[str, Any], stock: Callable[[str], Path], tmp_path: Path
) -> None:
    sparsity = sparsity_of(how)
    result = prune(options(stock(name), tmp_path / "small", score="sparsegpt", **how))
    small = check_folder(name, tmp_path / "small", load_file(stock(name) / "model.safetensors"), result)
    expected = sequential(name, lambda weight, x: sparsegpt([weight], x.T @ x, sparsity)[0][0])
    for key, value in small.items():
        if is_linear(key):
            assert int((value == 0).sum()) == sparsity.removed(value.numel())
            assert ((value != 0) == (expected[key] != 0)).float().mean() > 0.99, key
            if ".0." in key:  # behind it, one entry that goes the other way moves all others a little
                assert ((value - expected[key]).norm() / value.norm()).item() < 1e-3, key


@pytest.mark.usefixtures("windows")
def test_quality_comes_in_the_expected_order(tmp_path: Path) -> None:
    """On a trained model: SparseGPT is closer to the large model than Wanda, and Wanda than magnitude."""
    fixture = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
    ids = tokens(4, rows=8, length=24)
    logits = {}
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(fixture, dtype=torch.float32)(ids).logits.log_softmax(-1)
        for score in ("sparsegpt", "wanda", "magnitude"):
            prune(options(fixture, tmp_path / score, method="semi", score=score))
            small = AutoModelForCausalLM.from_pretrained(tmp_path / score, dtype=torch.float32)
            logits[score] = small(ids).logits.log_softmax(-1)
    divergence = {key: float((whole.exp() * (whole - value)).sum(-1).mean()) for key, value in logits.items()}
    assert divergence["sparsegpt"] < divergence["wanda"] < divergence["magnitude"], divergence


@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_calibration_text_is_read_as_for_structured(score: str, tmp_path: Path) -> None:
    fixture = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
    how = {"method": "unstructured", "score": score, "samples": 4, "length": 32}
    general = prune(options(fixture, tmp_path / "general", **how))
    text = tmp_path / "task.txt"
    text.write_text("In the beginning God created the heaven and the earth. " * 60)
    mixed = prune(options(fixture, tmp_path / "mixed", calibration=(str(text), "builtin"), **how))
    assert any("general text only" in note for note in general.notes)
    assert not mixed.notes
    assert read_map(tmp_path / "general").sha256 != read_map(tmp_path / "mixed").sha256
    again = prune(options(fixture, tmp_path / "again", calibration=(str(text), "builtin"), **how))
    assert again.small == mixed.small
    one, two = ((tmp_path / place / "model.safetensors").read_bytes() for place in ("mixed", "again"))
    assert one == two


@pytest.mark.parametrize(
    "how",
    [
        {"method": "semi", "score": "sparsegpt"},
        {"method": "structured", "score": "wanda", "keep_first": 1, "keep_last": 1},
        {"method": "structured", "keep_first": 1, "keep_last": 1},
        {"method": "depth", "keep_first": 1, "keep_last": 1},
    ],
    ids=lambda how: " ".join(map(str, how.values())),
)
def test_too_few_tokens_are_warned_of(how: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fixture = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
    prune(options(fixture, tmp_path / "small", samples=1, length=16, **how))
    assert "16 tokens of calibration text are fewer than a Linear's input features" in caplog.text
    caplog.clear()
    if how["method"] != "semi":
        prune(options(fixture, tmp_path / "as-cut", samples=1, length=16, refit=False, **how))
        assert "fewer than" not in caplog.text


# ---- --method given ----


def sparse_copy(large: Path, out: Path, dtype: torch.dtype | None = None, **config: Any) -> Path:
    """The model with its smallest half at zero and the rest moved a little, as another tool would leave it."""
    shutil.copytree(large, out)
    state = load_file(out / "model.safetensors")
    for key, value in state.items():
        if is_linear(key) and "layers.1.mlp.down" not in key:  # one that the other tool was told to ignore
            state[key] = (value * 1.01).masked_fill(lowest(value.abs(), parse_sparsity("2:4"), False), 0)
        state[key] = state[key].to(dtype or value.dtype).contiguous()
    save_file(state, out / "model.safetensors")
    body = raw_config(out) | config
    (out / "config.json").write_text(json.dumps(body))
    return out


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", GROUPED)
def test_a_sparse_checkpoint_from_elsewhere(
    name: str, dtype: torch.dtype | None, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    given = sparse_copy(stock(name), tmp_path / "given", dtype)
    result = prune(options(stock(name), tmp_path / "small", method="given", given=str(given)))
    theirs, small = load_file(given / "model.safetensors"), load_file(tmp_path / "small" / "model.safetensors")
    assert small.keys() == theirs.keys()
    assert all(torch.equal(small[key], value) and small[key].dtype == value.dtype for key, value in theirs.items())
    masks = read_map(tmp_path / "small").masks
    assert set(masks) == {key for key in theirs if is_linear(key) and "layers.1.mlp.down" not in key}
    assert all(torch.equal(mask.unpack(), theirs[key] != 0) for key, mask in masks.items())
    assert result.large - result.small == sum(int((theirs[key] == 0).sum()) for key in masks)
    manifest = read_manifest(tmp_path / "small")
    assert manifest is not None
    assert manifest.compression == ("mask",)
    assert not result.notes
    dry = prune(options(stock(name), tmp_path / "none", method="given", given=str(given), dry_run=True))
    assert dry.small == result.small


def test_a_sparse_checkpoint_of_another_model_is_remarked(stock: Callable[[str], Path], tmp_path: Path) -> None:
    build("llama-gqa", tmp_path / "large")
    state = load_file(tmp_path / "large" / "model.safetensors")
    state["model.norm.weight"] += 1
    save_file(state, tmp_path / "large" / "model.safetensors", {"format": "pt"})
    given = sparse_copy(stock("llama-gqa"), tmp_path / "given")
    result = prune(options(tmp_path / "large", tmp_path / "small", method="given", given=str(given)))
    assert "may have been pruned from another model" in result.summary()


def damaged(given: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(given / "model.safetensors")
    change(state)
    save_file(state, given / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s["model.layers.2.mlp.up_proj.weight"][0].fill_(float("nan")), MismatchError, "holds NaN or Inf"),
        (lambda s: s.update({k: torch.ones_like(v) for k, v in s.items()}), CheckpointError, "is not sparse: 0.00% of"),
        (lambda s: s.pop("model.norm.weight"), CheckpointError, "has no tensor model.norm.weight"),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(9)}),
            CheckpointError,
            r"model.norm.weight is \(9,\), config.json says \(48,\)",
        ),
    ],
)
def test_damaged_sparse_checkpoints(
    change: Callable[[dict[str, Tensor]], Any],
    error: type[Exception],
    message: str,
    stock: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    given = sparse_copy(stock("llama-gqa"), tmp_path / "given")
    damaged(given, change)
    with pytest.raises(error, match=message):
        prune(options(stock("llama-gqa"), tmp_path / "small", method="given", given=str(given)))
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_what_is_no_sparse_checkpoint_of_this_model(stock: Callable[[str], Path], tmp_path: Path) -> None:
    large = stock("llama-gqa")

    def refuse(given: Path, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            prune(options(large, tmp_path / "small", method="given", given=str(given)))
        assert not list(tmp_path.glob("small*"))

    refuse(stock("qwen2-gqa"), CheckpointError, "is of other sizes than")
    refuse(stock("llama-mqa"), CheckpointError, "is of other sizes than")
    packed = {"quantization_config": {"quant_method": "compressed-tensors"}}
    refuse(sparse_copy(large, tmp_path / "packed", **packed), CheckpointError, "save_compressed=False")
    prune(options(large, tmp_path / "ours", method="semi", score="magnitude"))
    refuse(tmp_path / "ours", KindError, "is a small-model that loram wrote")
    with pytest.raises(OutputError, match="is the input"):
        prune(options(large, tmp_path / "packed", method="given", given=str(tmp_path / "packed"), force=True))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "semi", "ratio": "0.6"}, "--ratio 0.6 has no use with --method semi"),
        ({"method": "semi", "pattern": "0:4"}, "--pattern 0:4 keeps nothing"),
        ({"method": "semi", "pattern": "4:4"}, "--pattern 4:4 keeps everything"),
        ({"method": "semi", "pattern": "half"}, "expected N:M"),
        ({"method": "unstructured", "pattern": "2:4"}, "--pattern has no use with --method unstructured"),
        ({"pattern": "2:4"}, "--pattern has no use with --method structured"),
        ({"method": "semi", "score": "taylor"}, "--score taylor measures whole heads and channels"),
        ({"score": "sparsegpt"}, "--score sparsegpt measures single weights"),
        ({"method": "semi", "keep_first": 2}, "--keep-first 2 has no use with --method semi"),
        ({"method": "unstructured", "keep_last": 1}, "--keep-last 1 has no use"),
        ({"method": "unstructured", "round_to": 64}, "--round-to 64 has no use"),
        ({"method": "given"}, "add --given FOLDER"),
        ({"method": "semi", "given": "x"}, "--given has no use with --method semi"),
        ({"method": "given", "given": "x", "ratio": "0.6"}, "--ratio 0.6 has no use with --method given"),
    ],
)
def test_options_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PruneOptions(model="m", **changes)


def test_a_pattern_that_does_not_divide(stock: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"--pattern 3:7 does not divide model.layers.0.self_attn.q_proj, which has 48"
    ):
        prune(options(stock("llama-gqa"), tmp_path / "small", method="semi", pattern="3:7"))
    with pytest.raises(OptionError, match=r"does not divide model.layers.0.mlp.down_proj, which has 40 input"):
        prune(options(stock("llama-gqa"), tmp_path / "small", method="semi", pattern="8:16", score="magnitude"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [{"score": "magnitude"}, {"score": "wanda"}], ids=str)
@pytest.mark.usefixtures("windows")
def test_nan_in_the_base(how: dict[str, Any], tmp_path: Path) -> None:
    model = make("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[1, 1] = float("nan")
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(MismatchError, match="NaN or Inf"):
        prune(options(tmp_path / "large", tmp_path / "small", method="semi", **how))
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
