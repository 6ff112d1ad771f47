"""verify: every check passes on what loram makes and fails on what was damaged, also the identity in numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from small_models import write_adapter, write_small_folder
from stock_models import GROUPED, build, leaves, random_kept, tokens

import loram.stages.prune as prune_stage
from loram.artifact import Manifest, Parent, drafting, read_json, read_manifest, relative_location
from loram.errors import AdapterError, InputError
from loram.options import ProjectOptions, PruneOptions, RecoverOptions, VerifyOptions
from loram.stages.project import project
from loram.stages.prune import prune
from loram.stages.recover import recover
from loram.stages.verify import VerifyResult, verify

WEIGHTS = "adapter_model.safetensors"
NAME = "llama-gqa"


def as_trained(small: Path, raw: Path, out: Path) -> Path:
    """What `loram train` leaves: peft's folder with a map and a manifest."""
    made = read_manifest(small)
    assert made is not None
    with drafting(out) as draft:
        for file in ("adapter_config.json", WEIGHTS):
            shutil.copyfile(raw / file, draft.path / file)
        shutil.copyfile(small / "pruning_map.safetensors", draft.path / "pruning_map.safetensors")
        draft.manifest = Manifest(
            kind="small-adapter",
            stage="train",
            family=made.family,
            base=made.base,
            pruning_map_sha256=made.pruning_map_sha256,
            parents=(Parent("small-model", made.digest(), relative_location(small, out)),),
        )
    return out


@pytest.fixture
def folder(stock: Callable[[str], Path], tmp_path: Path) -> Path:
    """large, small, trained (small adapter), recovered."""
    return chain(NAME, stock(NAME), tmp_path)


def chain(name: str, large: Path, folder: Path, small: Path | None = None, **lora: Any) -> Path:
    shutil.copytree(large, folder / "large")
    small = small or write_small_folder(folder / "large", random_kept(name, 2), folder / "small")
    raw = write_adapter(small, folder / "raw", list(leaves(name)), 3, **lora)
    as_trained(small, raw, folder / "trained")
    recover(RecoverOptions(adapter=str(folder / "trained"), out=str(folder / "recovered")))
    return folder


def look(adapter: Path, **changes: Any) -> VerifyResult:
    return verify(VerifyOptions(adapter=str(adapter), **changes))


def failed(result: VerifyResult) -> dict[str, str]:
    assert result.exit_code == (0 if result.ok else 6)
    assert result.ok == all(check.ok for check in result.checks)
    return {check.name: check.detail for check in result.checks if not check.ok}


@pytest.mark.parametrize("name", GROUPED)
def test_everything_holds_of_what_loram_made(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    folder = chain(name, stock(name), tmp_path)
    result = look(folder / "recovered", numeric=True)
    assert failed(result) == {}
    names = [check.name for check in result.checks]
    assert names == ["files", "finite", "base", "modules and shapes", "non-zero", "identity"]
    body = result.to_json()
    assert body["ok"] is True
    assert body["portable"] == dict.fromkeys(("peft", "vllm", "sglang", "llama_cpp"), True)
    assert all(set(check) == {"name", "ok", "detail"} for check in body["checks"])
    small = look(folder / "trained", numeric=True)
    assert failed(small) == {}
    assert not any(verdict.ok for verdict in small.portable.values())
    assert small.next_command.startswith("loram recover")


@pytest.mark.parametrize(
    "lora", [{"use_rslora": True, "r": 3}, {"rank_pattern": {"o_proj": 7}, "lora_alpha": 5}], ids=str
)
def test_the_identity_holds_of_folded_scales_too(
    lora: dict[str, Any], stock: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = chain(NAME, stock(NAME), tmp_path, **lora)
    assert failed(look(folder / "recovered", numeric=True)) == {}
    assert failed(look(folder / "trained", numeric=True)) == {}


@pytest.mark.parametrize("score", ["wanda", "taylor"])
def test_the_identity_holds_after_the_refit_too(
    score: str, stock: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune_stage, "calibration", lambda options, folder: tokens(1, 6, 24))
    small = tmp_path / "small"
    prune(
        PruneOptions(model=str(stock(NAME)), out=str(small), score=score, keep_first=1, keep_last=0, calibration=("x",))
    )
    made = read_manifest(small)
    assert made is not None
    assert "refit" in made.compression
    chain(NAME, stock(NAME), tmp_path, small)
    assert failed(look(tmp_path / "recovered", numeric=True, large=str(stock(NAME)))) == {}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {key: value.clone() for key, value in load((folder / WEIGHTS).read_bytes()).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


KEY = "base_model.model.model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda t: t[f"{KEY}.lora_A.weight"][0, 0].fill_(float("nan")), "finite"),
        (lambda t: [t.pop(f"{KEY}.lora_{x}.weight") for x in "AB"], "modules and shapes"),
        (lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(7, 4)}), "modules and shapes"),
        (
            lambda t: t.update(
                {f"{KEY.replace('1', '9')}.lora_{x}.weight": t[f"{KEY}.lora_{x}.weight"] + 1 for x in "AB"}
            ),
            "modules and shapes",
        ),
        (lambda t: [value.zero_() for key, value in t.items() if "lora_B" in key], "non-zero"),
    ],
)
def test_damage_is_found_and_named(change: Callable[[dict[str, torch.Tensor]], Any], check: str, folder: Path) -> None:
    rewrite(folder / "recovered", change)
    found = failed(look(folder / "recovered"))
    assert check in found
    assert f"{WEIGHTS} was changed" in found["files"]
    if check != "modules and shapes":
        (folder / "recovered" / "loram.json").unlink()
        assert set(failed(look(folder / "recovered", large=str(folder / "large")))) == {check}


def scatter_elsewhere(tensors: dict[str, torch.Tensor]) -> None:
    """The right values in the wrong rows: shapes, finiteness and norms all look right."""
    key = f"{KEY}.lora_B.weight"
    tensors[key] = tensors[key].roll(1, 0)


def forget_half(tensors: dict[str, torch.Tensor]) -> None:
    for key, value in tensors.items():
        if "lora_B" in key:
            value.mul_(0.5)


@pytest.mark.parametrize("change", [scatter_elsewhere, forget_half])
def test_a_broken_recovery_breaks_the_identity(change: Callable[[dict[str, torch.Tensor]], None], folder: Path) -> None:
    rewrite(folder / "recovered", change)
    found = failed(look(folder / "recovered", numeric=True))
    assert "the recovery is wrong" in found["identity"]


def test_another_base_is_found_by_its_weights(folder: Path, tmp_path: Path) -> None:
    other = build(NAME, tmp_path / "other")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-4:] = bytes(4)
    (other / "model.safetensors").write_bytes(data)
    found = failed(look(folder / "recovered", large=str(other)))
    assert set(found) == {"base"}
    assert "give that model" in found["base"]


def test_an_exchanged_map_is_found(folder: Path, stock: Callable[[str], Path]) -> None:
    other = write_small_folder(stock(NAME), random_kept(NAME, 9), folder / "other")
    shutil.copyfile(other / "pruning_map.safetensors", folder / "trained" / "pruning_map.safetensors")
    assert "map" in failed(look(folder / "trained"))


def test_a_foreign_adapter_is_looked_at_too(folder: Path, tmp_path: Path) -> None:
    foreign = write_adapter(folder / "large", tmp_path / "foreign", ["q_proj", "lm_head"], 1, use_rslora=True)
    result = look(foreign, large=str(folder / "large"))
    assert failed(result) == {}
    assert not result.portable["vllm"].ok
    assert result.portable["peft"].ok
    config = read_json(foreign / "adapter_config.json") | {"base_model_name_or_path": "org/unknown"}
    (foreign / "adapter_config.json").write_text(json.dumps(config))
    unknown = look(foreign)
    assert unknown.ok
    assert "add --large FOLDER" in str(unknown)
    assert "add --large FOLDER" in failed(look(foreign, numeric=True))["identity"]
    assert "add --small FOLDER" in failed(look(foreign, numeric=True, large=str(folder / "large")))["identity"]


def test_a_projected_adapter_passes(folder: Path) -> None:
    project(
        ProjectOptions(adapter=str(folder / "recovered"), small=str(folder / "small"), out=str(folder / "projected"))
    )
    assert failed(look(folder / "projected", numeric=True)) == {}


def test_what_is_no_adapter_is_refused(tmp_path: Path, stock: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="does not exist"):
        look(tmp_path / "gone")
    with pytest.raises(AdapterError, match=r"has no adapter_config.json"):
        look(stock(NAME))
