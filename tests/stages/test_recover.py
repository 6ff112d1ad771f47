"""recover: linear, lossless, portable, and only for the small model that the adapter was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from small_models import write_adapter, write_small_folder
from stock_models import GROUPED, VARIANTS, leaves, random_kept

from loram.adapter import Adapter, LoraPair, load_adapter
from loram.artifact import read_json, read_manifest, sha256_file, write_json
from loram.errors import AdapterError, KindError, MismatchError, OptionError, PruningMapError
from loram.options import ProjectOptions, RecoverOptions
from loram.pruning_map import read_map
from loram.stages.project import project
from loram.stages.recover import recover, recover_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Work:
    """A small model and an adapter on it."""

    def __init__(self, name: str, large: Path, folder: Path, seed: int = 0, **lora: Any) -> None:
        self.folder = folder
        self.small = write_small_folder(large, random_kept(name, seed), folder / "small")
        self.adapter = write_adapter(self.small, folder / "trained", list(leaves(name)), seed, **lora)

    def recover(self, out: str = "recovered", **changes: Any) -> Path:
        values = {"adapter": str(self.adapter), "small": str(self.small), "out": str(self.folder / out), **changes}
        recover(RecoverOptions(**values))
        return self.folder / out

    def project(self, adapter: Path, out: str = "projected") -> Path:
        project(ProjectOptions(adapter=str(adapter), small=str(self.small), out=str(self.folder / out)))
        return self.folder / out


@pytest.fixture
def work(stock: Callable[[str], Path], tmp_path: Path) -> Work:
    return Work("llama-gqa", stock("llama-gqa"), tmp_path)


def product(pair: LoraPair) -> torch.Tensor:
    return pair.scale * (pair.b.double() @ pair.a.double())


@pytest.mark.parametrize("name", VARIANTS)
def test_project_undoes_recover_bit_for_bit(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    work = Work(name, stock(name), tmp_path)
    before = load_file(work.adapter / WEIGHTS)
    after = load_file(work.project(work.recover()) / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


PATTERNED = {
    "rslora": {"use_rslora": True, "r": 3, "lora_alpha": 7},
    "patterns": {"rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 7}, "alpha_pattern": {"o_proj": 3}},
}


@pytest.mark.parametrize("kind", PATTERNED)
def test_with_patterns_the_bits_stay_without_portable_and_the_product_with_it(
    kind: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    work = Work("qwen3-gqa", stock("qwen3-gqa"), tmp_path, **PATTERNED[kind])
    before, kept = load_file(work.adapter / WEIGHTS), work.recover("kept", portable=False)
    after = load_file(work.project(kept, "a") / WEIGHTS)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert read_json(kept / CONFIG)["rank_pattern"] == PATTERNED[kind].get("rank_pattern", {})
    folded = work.recover("folded")
    assert read_json(folded / CONFIG)["rank_pattern"] == {}
    assert not read_json(folded / CONFIG)["use_rslora"]
    original, back = load_adapter(work.adapter), load_adapter(work.project(folded, "b"))
    for module, pair in original.pairs.items():
        expected = product(pair)
        assert ((product(back.pairs[module]) - expected).norm() / expected.norm()).item() < 1e-6, module


@pytest.mark.parametrize("name", GROUPED)
def test_recover_commutes_with_linear_aggregation(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    """Averaging factors, and stacking clients along the rank, before or after: the same bits."""
    small = write_small_folder(stock(name), random_kept(name, 1), tmp_path / "small")
    pruning_map = read_map(small)
    one, two = (
        load_adapter(write_adapter(small, tmp_path / f"client-{seed}", list(leaves(name)), seed)) for seed in (1, 2)
    )

    def averaged(left: Adapter, right: Adapter) -> Adapter:
        return left.map_pairs(
            lambda m, p: replace(p, a=0.25 * p.a + 0.75 * right.pairs[m].a, b=0.25 * p.b + 0.75 * right.pairs[m].b)
        )

    def stacked(left: Adapter, right: Adapter) -> Adapter:
        return left.map_pairs(
            lambda m, p: replace(
                p, a=torch.cat([p.a, right.pairs[m].a]), b=torch.cat([0.5 * p.b, 0.5 * right.pairs[m].b], 1)
            )
        )

    def up(adapter: Adapter) -> Adapter:
        return recover_adapter(adapter, pruning_map, "client")

    for aggregate in (averaged, stacked):
        before, after = up(aggregate(one, two)), aggregate(up(one), up(two))
        for module, pair in before.pairs.items():
            assert torch.equal(pair.a, after.pairs[module].a)
            assert torch.equal(pair.b, after.pairs[module].b)


def test_what_is_written_is_portable_and_says_where_it_is_from(work: Work) -> None:
    out = work.recover(base_id="org/large")
    manifest, small = read_manifest(out), read_manifest(work.small)
    assert manifest is not None
    assert small is not None
    assert manifest.base is not None
    assert small.base is not None
    assert (manifest.kind, manifest.stage, manifest.base.id) == ("adapter", "recover", "org/large")
    assert manifest.base.weights_fingerprint == small.base.weights_fingerprint
    assert (out / manifest.base.location).resolve() == (work.small / small.base.location).resolve()
    assert manifest.pruning_map_sha256 == small.pruning_map_sha256
    assert small.digest() in {parent.digest for parent in manifest.parents}
    assert manifest.files[WEIGHTS] == sha256_file(out / WEIGHTS)
    config = read_json(out / CONFIG)
    assert config["base_model_name_or_path"] == "org/large"
    assert config["inference_mode"] is True
    assert not (out / "adapter_model.bin").exists()
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in load_file(out / WEIGHTS))


def test_an_adapter_of_loram_needs_no_small_model(work: Work) -> None:
    first = work.recover()
    projected = work.project(first)
    manifest = read_manifest(projected)
    assert manifest is not None
    assert manifest.kind == "small-adapter"
    shutil.move(work.small, work.folder / "elsewhere")
    recover(RecoverOptions(adapter=str(projected), out=str(work.folder / "again")))
    assert (work.folder / "again" / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()


def test_recover_of_a_large_adapter_is_the_identity(work: Work) -> None:
    first = work.recover()
    recover(RecoverOptions(adapter=str(first), out=str(work.folder / "again")))
    assert (work.folder / "again" / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()
    manifest = read_manifest(work.folder / "again")
    assert manifest is not None
    assert manifest.kind == "adapter"


def test_a_foreign_adapter_needs_the_small_model(work: Work) -> None:
    with pytest.raises(OptionError, match="add --small FOLDER"):
        recover(RecoverOptions(adapter=str(work.adapter), out=str(work.folder / "x")))
    with pytest.raises(KindError, match="run `loram prune"):
        work.recover("x", small=str(work.adapter))
    assert not (work.folder / "x").exists()


def test_another_map_is_refused_and_both_are_named(work: Work, stock: Callable[[str], Path]) -> None:
    other = write_small_folder(stock("llama-gqa"), random_kept("llama-gqa", 8), work.folder / "other")
    projected = work.project(work.recover())
    with pytest.raises(MismatchError) as caught:
        recover(RecoverOptions(adapter=str(projected), small=str(other), out=str(work.folder / "x")))
    for digest in (read_map(work.small).sha256, read_map(other).sha256):
        assert digest[:12] in str(caught.value)
    shutil.copyfile(other / "pruning_map.safetensors", projected / "pruning_map.safetensors")
    with pytest.raises(MismatchError, match="the map was exchanged"):
        recover(RecoverOptions(adapter=str(projected), out=str(work.folder / "x")))
    # The same exchange in the small model that a foreign adapter is recovered with.
    shutil.copyfile(other / "pruning_map.safetensors", work.small / "pruning_map.safetensors")
    with pytest.raises(MismatchError, match="the map was exchanged"):
        work.recover("x")
    (projected / "pruning_map.safetensors").unlink()
    with pytest.raises(PruningMapError, match="does not exist"):
        recover(RecoverOptions(adapter=str(projected), out=str(work.folder / "x")))
    assert not list(work.folder.glob("x*"))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "PiSSA", "eva", "lora_ga"])
def test_inits_that_absorb_base_weights_are_refused_and_others_not(init: str, work: Work) -> None:
    write_json(work.adapter / CONFIG, read_json(work.adapter / CONFIG) | {"init_lora_weights": init})
    if init == "eva":  # chooses directions for A, B starts at zero: nothing of the base is in BA
        work.recover("x")
        return
    with pytest.raises(AdapterError, match="was initialised with"):
        work.recover("x")
    assert not list(work.folder.glob("x*"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load((folder / WEIGHTS).read_bytes())
    change(tensors)
    save_file({key: value.clone() for key, value in tensors.items()}, folder / WEIGHTS)


KEY = "base_model.model.model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: [t.pop(f"{KEY}.lora_{x}.weight") for x in "AB"], MismatchError, "lacks model.layers.1.mlp.up_proj"),
        (lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(40, 4)}), MismatchError, "updates a weight of shape"),
        (lambda t: t[f"{KEY}.lora_B.weight"].fill_(float("nan")), MismatchError, "lora_B holds NaN or Inf"),
        (lambda t: t[f"{KEY}.lora_A.weight"][0].fill_(float("inf")), MismatchError, "lora_A holds NaN or Inf"),
        (
            lambda t: t.update({f"{KEY.replace('1', '7')}.lora_{x}.weight": t[f"{KEY}.lora_{x}.weight"] for x in "AB"}),
            MismatchError,
            "layers.7",
        ),
        (
            lambda t: t.update({f"{KEY}x.lora_{x}.weight": t[f"{KEY}.lora_{x}.weight"] for x in "AB"}),
            MismatchError,
            "up_projx",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None], error: type[Exception], message: str, work: Work
) -> None:
    edit(work.adapter, change)
    with pytest.raises(error, match=message):
        work.recover("x")
    assert not list(work.folder.glob("x*"))


def test_dry_run_writes_nothing(work: Work) -> None:
    result = recover(
        RecoverOptions(adapter=str(work.adapter), small=str(work.small), out=str(work.folder / "x"), dry_run=True)
    )
    assert result.to_json()["modules"] == 21
    assert json.dumps(result.to_json())
    assert not list(work.folder.glob("x*"))
