"""prune: the map it writes is the small checkpoint's, by every method; scores and refit against whole-model oracles."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_models import GROUPED, LAYERS, MLP, VARIANTS, build, cut_by_hand, kv_heads, make, raw_config, tokens
from torch import Tensor

import loram.cutting
import loram.stages.prune as stage
from loram.artifact import find_location, read_manifest, sha256_file
from loram.checkpoint import describe_base
from loram.errors import CheckpointError, FamilyError, KindError, MismatchError, OptionError
from loram.options import PruneOptions
from loram.pruning.refit import DAMPING
from loram.pruning_map import PruningMap, read_map
from loram.stages.prune import prune
from loram.stages.prune_random import prune as streamed

WINDOWS = tokens(21, rows=6, length=24)


def options(large: Path, out: Path, **changes: Any) -> PruneOptions:
    return PruneOptions(**{"model": str(large), "out": str(out), "keep_first": 1, "keep_last": 0, **changes})


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Calibration without a tokenizer: the same random tokens for every stock model."""
    monkeypatch.setattr(stage, "calibration", lambda options, folder: WINDOWS)
    return WINDOWS


def units_kept(pruning_map: PruningMap, name: str) -> dict[int, tuple[list[int], list[int]]]:
    def kept(layer: int, unit: str, size: int) -> list[int]:
        axis = pruning_map.axes.get(f"layers.{layer}.{unit}")
        return list(range(size)) if axis is None else axis.kept.tolist()

    return {n: (kept(n, "kv_heads", kv_heads(name)), kept(n, "mlp", MLP)) for n in range(LAYERS)}


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        key: value
        for file in folder.glob("*.safetensors")
        if "map" not in file.name
        for key, value in load_file(file).items()
    }


@pytest.mark.parametrize("how", [{"method": "random"}, {"score": "magnitude"}], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_small_checkpoint_is_the_large_one_cut_by_its_map(
    name: str, how: dict[str, Any], stock: Callable[[str], Path], tmp_path: Path
) -> None:
    result = prune(options(stock(name), tmp_path / "small", **how))
    kept = units_kept(read_map(tmp_path / "small"), name)
    expected = cut_by_hand(name, load_file(stock(name) / "model.safetensors"), kept)
    found = weights(tmp_path / "small")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert result.small == sum(value.numel() for value in found.values())
    assert result.large == sum(value.numel() for value in make(name).parameters())
    assert [len(channels) for _, channels in kept.values()] == [MLP, MLP // 2, MLP // 2]
    heads = kv_heads(name)
    assert [len(part) for part, _ in kept.values()] == [heads, max(heads // 2, 1), max(heads // 2, 1)]
    said = "attention is not cut: there is one kv head"
    assert (said in result.summary()) == (said in result.to_json()["notes"]) == (heads == 1)


def test_the_manifest_says_what_was_done(stock: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "small"
    result = prune(options(stock("llama-gqa"), out, method="random", seed=3, base_id="org/large"))
    manifest = read_manifest(out)
    assert manifest is not None
    assert (manifest.kind, manifest.stage, manifest.family, manifest.compression) == (
        "small-model",
        "prune",
        "llama",
        ("axes",),
    )
    assert manifest.pruning_map_sha256 == read_map(out).sha256 == sha256_file(out / "pruning_map.safetensors")
    assert manifest.base is not None
    assert manifest.base.id == "org/large"
    assert manifest.base.weights_fingerprint == describe_base(stock("llama-gqa")).weights_fingerprint
    assert (find_location(manifest.base.location, out) or out).resolve() == stock("llama-gqa").resolve()
    assert manifest.options["seed"] == 3
    on_disk = {file.name for file in out.iterdir()} - {"loram.json", "loram.log"}
    assert set(manifest.files) == on_disk
    assert all(sha256_file(out / file) == digest for file, digest in manifest.files.items())
    assert result.to_json()["params"].keys() >= {"large", "small"}
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", VARIANTS)
def test_random_units_without_torch_give_the_same_files(
    name: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    how: dict[str, Any] = {"method": "random", "ratio": "0.4", "seed": 5}
    prune(options(stock(name), tmp_path / "general" / "small", **how))
    streamed(options(stock(name), tmp_path / "streamed" / "small", **how))
    found = {
        place: {
            file.name: file.read_bytes() for file in (tmp_path / place / "small").iterdir() if file.suffix != ".log"
        }
        for place in ("general", "streamed")
    }
    manifests = [json.loads(files.pop("loram.json")) for files in found.values()]
    assert found["general"] == found["streamed"]
    for manifest in manifests:
        manifest["options"].pop("out")
    assert manifests[0] == manifests[1]


def test_a_nan_is_refused_without_torch_too(tmp_path: Path) -> None:
    large = build("llama-gqa", tmp_path / "large")
    tensors = load_file(large / "model.safetensors")
    for value in (float("nan"), float("-inf")):
        save_file(
            tensors | {"model.norm.weight": torch.full_like(tensors["model.norm.weight"], value)},
            large / "model.safetensors",
        )
        with pytest.raises(MismatchError, match=r"model.norm.weight holds NaN or Inf"):
            streamed(options(large, tmp_path / "small", method="random"))
        assert not list(tmp_path.glob("small*"))


def test_random_units_are_cut_without_importing_torch(stock: Callable[[str], Path], tmp_path: Path) -> None:
    line = ["prune", str(stock("llama-gqa")), "--method", "random", "--keep-first", "1", "--keep-last", "0"]
    code = (
        "import sys; from loram_cli.app import main; "
        f"assert main({[*line, '-o', str(tmp_path / 'small')]!r}) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert read_map(tmp_path / "small").axes


@pytest.mark.parametrize("how", [{"method": "random"}, {"score": "magnitude"}], ids=str)
def test_the_seed_decides_and_nothing_else(how: dict[str, Any], stock: Callable[[str], Path], tmp_path: Path) -> None:
    names = ("first", "again", "other")
    for name, seed in zip(names, (1, 1, 2), strict=True):
        prune(options(stock("mistral-mha"), tmp_path / name, seed=seed, **how))
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in names)
    assert first == again
    assert (first == other) == ("score" in how)
    maps = [read_map(tmp_path / name).sha256 for name in names]
    assert maps[0] == maps[1]
    assert (maps[0] == maps[2]) == ("score" in how)


def test_shards_in_and_shards_out(
    stock: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = build("qwen3-gqa", tmp_path / "large", max_shard_size="20KB")
    whole = tmp_path / "whole"
    prune(options(large, whole, method="random"))
    write_small = loram.cutting.write_small
    monkeypatch.setattr(stage, "write_small", lambda *a, **k: write_small(*a, **{**k, "shard_bytes": 30_000}))
    prune(options(large, tmp_path / "small", method="random"))
    shards = sorted(tmp_path.glob("small/model-*.safetensors"))
    assert len(shards) >= 2
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: shard.name for shard in shards for key in load_file(shard)}
    single, dealt = weights(whole), weights(tmp_path / "small")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in single.values())
    assert single.keys() == dealt.keys()
    assert all(torch.equal(dealt[key], value) for key, value in single.items())


def test_small_tiles_give_the_same_bytes(
    stock: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
    for name in ("whole", "tiles"):
        prune(options(fixture, tmp_path / name, score="magnitude"))
        monkeypatch.setattr("loram.stored.CHUNK", 1)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "tiles"))
    assert one == two


# ---- scores, against the whole stock model ----


def hooked_inputs(name: str) -> dict[str, Tensor]:
    """The inputs of every Linear of the stock model on the windows: {module: (tokens, in)}, fp64."""
    model, seen = make(name), {}

    def watch(module: str) -> Callable[..., None]:
        def hook(_: Any, inputs: Any) -> None:
            seen[module] = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()

        return hook

    for module, found in model.named_modules():
        if module.endswith(("o_proj", "down_proj")):
            found.register_forward_pre_hook(watch(module))
    with torch.no_grad():
        model(WINDOWS, use_cache=False)
    return seen


def best_by(
    name: str, layer: int, heads: Tensor, channels: Tensor, count: tuple[int, int]
) -> tuple[list[int], list[int]]:
    """The highest sums: `heads` one number per row of o's input, `channels` one per column of down."""
    sums = heads.reshape(kv_heads(name), -1).sum(1)
    return sums.topk(count[0]).indices.sort().values.tolist(), channels.topk(count[1]).indices.sort().values.tolist()


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.endswith("-mqa")])
def test_wanda_keeps_the_highest_columns(
    name: str, windows: Tensor, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    prune(options(stock(name), tmp_path / "small", score="wanda", refit=False))
    found, inputs = units_kept(read_map(tmp_path / "small"), name), hooked_inputs(name)
    state = {key: value.double() for key, value in make(name).state_dict().items()}
    for layer in (1, 2):
        scores = {}
        for leaf in ("self_attn.o_proj", "mlp.down_proj"):
            module = f"model.layers.{layer}.{leaf}"
            scores[leaf] = (state[f"{module}.weight"].abs() * inputs[module].square().sum(0).sqrt()).sum(0)
        expected = best_by(
            name, layer, scores["self_attn.o_proj"], scores["mlp.down_proj"], (kv_heads(name) // 2, MLP // 2)
        )
        assert found[layer] == expected


@pytest.mark.parametrize("name", GROUPED)
def test_taylor_keeps_the_highest_weight_times_gradient(
    name: str, windows: Tensor, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    prune(options(stock(name), tmp_path / "small", score="taylor", refit=False))
    found = units_kept(read_map(tmp_path / "small"), name)
    model = make(name)
    for window in WINDOWS:
        logits = model(window[None], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], window[1:]).backward()
    importance = {
        key: (value * value.grad).abs().double()
        for key, value in model.named_parameters()
        if value.grad is not None and value.dim() == 2
    }
    fused = VARIANTS[name][0] == "phi3"
    for layer in (1, 2):
        part = {key.split(".")[-2]: value for key, value in importance.items() if f"layers.{layer}." in key}
        if fused:
            queries = part["o_proj"].shape[1]
            width = (part["qkv_proj"].shape[0] - queries) // 2
            part["q_proj"], part["k_proj"], part["v_proj"] = part["qkv_proj"].split([queries, width, width])
            part["gate_proj"], part["up_proj"] = part["gate_up_proj"].split(MLP)
        total = kv_heads(name)
        heads = part["o_proj"].sum(0).reshape(total, -1).sum(1)
        for leaf in ("q_proj", "k_proj", "v_proj"):
            heads = heads + part[leaf].sum(1).reshape(total, -1).sum(1)
        channels = part["down_proj"].sum(0) + part["gate_proj"].sum(1) + part["up_proj"].sum(1)
        assert found[layer] == best_by(name, layer, heads, channels, (total // 2, MLP // 2))


@pytest.mark.parametrize("method", ["structured", "random"])
@pytest.mark.parametrize("name", VARIANTS)
def test_refit_is_the_ridge_solution_on_the_models_own_inputs(
    name: str, method: str, windows: Tensor, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    prune(options(stock(name), tmp_path / "small", method=method, calibration=("builtin",)))
    kept, inputs, found = (
        units_kept(read_map(tmp_path / "small"), name),
        hooked_inputs(name),
        weights(tmp_path / "small"),
    )
    state = {key: value.double() for key, value in make(name).state_dict().items()}
    plain = cut_by_hand(name, load_file(stock(name) / "model.safetensors"), kept)
    refitted = set()
    for layer in (1, 2):
        for leaf, units, total in (
            ("self_attn.o_proj", kept[layer][0], kv_heads(name)),
            ("mlp.down_proj", kept[layer][1], MLP),
        ):
            module = f"model.layers.{layer}.{leaf}"
            if len(units) == total:
                continue
            x, weight = inputs[module], state[f"{module}.weight"]
            width = x.shape[1] // total
            columns = torch.tensor([unit * width + row for unit in units for row in range(width)])
            inner = x[:, columns]
            penalty = (DAMPING * inner.square().sum(0).mean()).sqrt() * torch.eye(len(columns), dtype=torch.float64)
            right = torch.cat([x @ weight.T, torch.zeros(len(columns), weight.shape[0], dtype=torch.float64)])
            expected = torch.linalg.lstsq(torch.cat([inner, penalty]), right).solution.T
            value = found[f"{module}.weight"].double()
            assert ((value - expected).norm() / expected.norm()).item() < 1e-4, module
            refitted.add(f"{module}.weight")
    manifest = read_manifest(tmp_path / "small")
    assert manifest is not None
    assert manifest.compression == ("axes", "refit")
    assert all(torch.equal(found[key], value) for key, value in plain.items() if key not in refitted)
    assert not (tmp_path / "small" / "refit").exists()


# ---- what is refused ----


def changed(name: str, folder: Path, **config: Any) -> Path:
    build(name, folder)
    body = raw_config(folder)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (body | config).items() if v is not ...}))
    return folder


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            {"intermediate_size": 39},
            CheckpointError,
            r"up_proj.weight is \(40, 48\), config.json says \(39, 48\)|gate_proj",
        ),
        ({"num_key_value_heads": ...}, CheckpointError, "the two do not belong together"),
        ({"num_key_value_heads": 4}, CheckpointError, "the two do not belong together"),
        ({"vocab_size": 65}, CheckpointError, r"embed_tokens.weight is \(64, 48\), config.json says \(65, 48\)"),
        ({"num_hidden_layers": 4}, CheckpointError, "has no tensor model.layers.3"),
        ({"num_hidden_layers": 2}, FamilyError, "holds model.layers.2.*does not have"),
        ({"attention_bias": True}, CheckpointError, "has no tensor model.layers.0.self_attn.q_proj.bias"),
        ({"hidden_size": ...}, FamilyError, "hidden_size is missing"),
        ({"model_type": "mixtral"}, FamilyError, "mixture of experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, KindError, "is quantized"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    config: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    large = changed("llama-gqa", tmp_path / "large", **config)
    with pytest.raises(error, match=message):
        prune(options(large, tmp_path / "small", method="random"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]


@pytest.mark.parametrize("how", [{"method": "random"}, {"score": "magnitude"}], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_in_the_base_are_named(how: dict[str, Any], value: float, tmp_path: Path) -> None:
    model = make("llama-gqa")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[1, 1] = value
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(MismatchError, match=r"layers.0.self_attn.k_proj.weight holds NaN or Inf"):
        prune(options(tmp_path / "large", tmp_path / "small", **how))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]


def test_dry_run_writes_nothing_and_small_models_are_not_pruned_again(
    stock: Callable[[str], Path], tmp_path: Path
) -> None:
    result = prune(options(stock("llama-gqa"), tmp_path / "small", method="random", dry_run=True))
    assert result.path is None
    assert list(tmp_path.iterdir()) == []
    assert result.small == prune(options(stock("llama-gqa"), tmp_path / "small", method="random")).small
    with pytest.raises(KindError, match=r"is a small-model \(axes\); `loram prune` works on the large model, or"):
        prune(options(tmp_path / "small", tmp_path / "smaller", method="random"))


def test_keeping_every_layer_or_nothing_is_refused(stock: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="leave no layer of 3 to prune"):
        prune(options(stock("llama-gqa"), tmp_path / "small", method="random", keep_last=2))
    with pytest.raises(OptionError, match="leaves no MLP channel"):
        prune(options(stock("llama-gqa"), tmp_path / "small", method="random", ratio="0.99"))
    assert list(tmp_path.iterdir()) == []
