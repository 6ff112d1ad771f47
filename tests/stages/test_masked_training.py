"""Masked training from end to end: prune by weight (semi, unstructured, given), train, stop, recover, verify, eval."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loram
from loram.adapter import load_adapter
from loram.artifact import read_manifest
from loram.data.encoding import encode
from loram.data.sources import read_sources
from loram.errors import Interrupted, KindError, MismatchError, OptionError
from loram.evaluation.losses import summarize
from loram.evaluation.streamed import StreamedModel
from loram.modeling import load_model, load_tokenizer
from loram.progress import SILENT, Progress
from loram.pruning_map import read_map
from loram.stages.recover import recover_adapter
from loram.training.lora import attach_masked

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MADE: dict[str, dict[str, Any]] = {
    "semi": {"method": "semi", "pattern": "2:4", "score": "magnitude"},
    "unstructured": {"method": "unstructured", "ratio": 0.55, "score": "magnitude"},
    "given": {"method": "given"},
}
MASKED = pytest.mark.parametrize("how", MADE)
STEPS = 6


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """large, data, and for every way of pruning weights a small model with its adapter, trained under the masks."""
    folder = tmp_path_factory.mktemp("masked")
    shutil.copytree(FIXTURE, folder / "large")
    rows = [{"prompt": f"And the LORD said {n} ", "completion": "unto Moses " * (1 + n % 3)} for n in range(14)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for how, options in MADE.items():
        given = {"given": sparse_elsewhere(folder)} if how == "given" else {}
        loram.prune(folder / "large", out=folder / how, **options, **given)
        train(folder, how, folder / f"{how}-adapter")
    return folder


def sparse_elsewhere(folder: Path) -> Path:
    """What another program would have left: the 2:4 model's weights, without anything of loram's."""
    out = folder / "elsewhere"
    shutil.copytree(folder / "semi", out, ignore=shutil.ignore_patterns("loram*", "pruning_map*"))
    return out


def train(work: Path, how: str, out: Path, progress: Progress = SILENT, **changes: Any) -> Any:
    plain: dict[str, Any] = {
        "steps": STEPS,
        "lr": 5e-3,
        "dtype": "fp32",
        "batch": 2,
        "accumulate": 2,
        "dropout": 0.2,
        "log_every": 1,
    }
    return loram.train(work / how, out=out, progress=progress, **{"data": work / "data.jsonl", **plain, **changes})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(10, 40).reshape(2, 15), use_cache=False).logits
    return found


@MASKED
def test_the_small_model_sees_the_update_under_its_mask(work: Path, how: str) -> None:
    """The saved adapter, attached by loram, is the dense twin W ∘ M + (s·B·A) ∘ M in a stock model."""
    adapter, pruning_map = load_adapter(work / f"{how}-adapter"), read_map(work / how)
    model = attach_masked(load_model(work / how, dtype="fp32"), adapter, pruning_map.mask_in_small)
    twin = AutoModelForCausalLM.from_pretrained(work / how, dtype=torch.float32)
    bare = logits(twin)
    with torch.no_grad():
        for module, pair in adapter.pairs.items():
            mask = pruning_map.masks[f"{module}.weight"].unpack()
            twin.get_submodule(module).weight += pair.scale * (pair.b @ pair.a) * mask
            assert not twin.get_submodule(module).weight[~mask].any()
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)
    assert (logits(twin) - bare).abs().max() > 1e-2


@MASKED
def test_recovery_is_the_identity_and_says_what_was_hidden(work: Path, tmp_path: Path, how: str) -> None:
    result: Any = loram.recover(work / f"{how}-adapter", out=tmp_path / "adapter")
    small, recovered = load_file(work / f"{how}-adapter" / WEIGHTS), load_file(tmp_path / "adapter" / WEIGHTS)
    assert {key.replace(".masked_", ".lora_"): value.tolist() for key, value in small.items()} == {
        key: value.tolist() for key, value in recovered.items()
    }
    hidden, total = 0.0, 0.0
    for name, mask in read_map(work / how).masks.items():
        a, b = (recovered[f"{PREFIX}{name.removesuffix('.weight')}.lora_{part}.weight"] for part in "AB")
        delta = (16 / 8 * (b @ a)).double()
        total += float(delta.square().sum())
        hidden += float((delta * ~mask.unpack()).square().sum())
    body = result.to_json()["mask"]
    assert (body["masked"], body["modules"]) == (True, 28)
    assert body["norm"] == pytest.approx(total**0.5, rel=1e-5)
    assert body["hidden_norm"] == pytest.approx(hidden**0.5, rel=1e-5)
    assert 0.5 < body["hidden_share"] < 0.8
    for folder in (work / f"{how}-adapter", tmp_path / "adapter"):
        manifest = read_manifest(folder)
        assert manifest is not None
        assert manifest.training is not None
        assert manifest.training["mask"] == body
    assert "the mask hid" in str(result)


@MASKED
def test_verify_states_it_and_the_identity_holds_under_the_mask(work: Path, tmp_path: Path, how: str) -> None:
    loram.recover(work / f"{how}-adapter", out=tmp_path / "adapter")
    for folder in (work / f"{how}-adapter", tmp_path / "adapter"):
        checked: Any = loram.verify(folder, numeric=True)
        assert checked.ok, checked.summary()
        details = {check.name: check.detail for check in checked.checks}
        assert details["mask"].startswith("the mask hid ")
        assert details["identity"].endswith("the update masked on both sides")
    small = loram.verify(work / f"{how}-adapter").to_json()
    assert small["portable"] == dict.fromkeys(("peft", "vllm", "sglang", "llama_cpp"), False)
    assert loram.verify(tmp_path / "adapter").to_json()["portable"]["peft"]


def test_verify_knows_from_the_record_where_the_small_model_is_gone(work: Path, tmp_path: Path) -> None:
    loram.recover(work / "semi-adapter", out=tmp_path / "adapter")
    alone = tmp_path / "alone" / "adapter"
    shutil.copytree(tmp_path / "adapter", alone)
    before: Any = loram.verify(tmp_path / "adapter")
    after: Any = loram.verify(alone, large=work / "large")
    found = [next(check.detail for check in result.checks if check.name == "mask") for result in (before, after)]
    assert found[0] == found[1]
    lost: Any = loram.verify(alone, large=work / "large", numeric=True)
    assert "the identity needs the pruning map; add --small" in str(lost)
    assert loram.verify(alone, large=work / "large", small=work / "semi", numeric=True).to_json()["ok"]


def test_a_wrong_recovery_of_a_masked_update_is_noticed(work: Path, tmp_path: Path) -> None:
    loram.recover(work / "semi-adapter", out=tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    key = f"{PREFIX}model.layers.1.mlp.up_proj.lora_B.weight"
    stored[key] = stored[key].flip(0).contiguous()
    from safetensors.torch import save_file

    save_file(stored, tmp_path / "adapter" / WEIGHTS)
    checked: Any = loram.verify(tmp_path / "adapter", numeric=True)
    assert {check.name for check in checked.checks if not check.ok} == {"files", "identity"}


@MASKED
def test_stock_peft_loads_the_recovered_one_and_not_the_small_one(work: Path, tmp_path: Path, how: str) -> None:
    loram.recover(work / f"{how}-adapter", out=tmp_path / "adapter")
    stock = AutoModelForCausalLM.from_pretrained(work / "large", dtype=torch.float32)
    bare = logits(stock)
    assert (logits(PeftModel.from_pretrained(stock, str(tmp_path / "adapter"))) - bare).abs().max() > 1e-2
    with pytest.raises(KeyError, match="LORAM_MASKED_LORA"):
        PeftModel.from_pretrained(load_model(work / how), str(work / f"{how}-adapter"))


class Stop(Progress):
    """SIGTERM after so many steps."""

    def __init__(self, after: int) -> None:
        self.after, self.label = after, ""

    def begin(self, label: str, total: int) -> None:
        self.label = label

    def advance(self, amount: int = 1, **figures: float) -> None:
        self.after -= amount if self.label == "train" else 0
        if self.after == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


@MASKED
def test_stopped_and_continued_to_the_last_digit(work: Path, tmp_path: Path, how: str) -> None:
    with pytest.raises(Interrupted, match=r"at step [45], which is saved"):
        train(work, how, tmp_path / "out", Stop(4))
    with pytest.raises(OptionError, match="--unmasked-update was False and is True now"):
        train(work, how, tmp_path / "out", unmasked_update=True)
    result = train(work, how, tmp_path / "out")
    assert lines(tmp_path / "out") == lines(work / f"{how}-adapter")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (work / f"{how}-adapter" / WEIGHTS).read_bytes()
    again = train(work, how, tmp_path / "out")  # finished: says so, and knows what was hidden
    assert again.hidden == result.hidden is not None


def test_without_the_mask_it_is_plain_lora(work: Path, tmp_path: Path) -> None:
    result = train(work, "semi", tmp_path / "plain", unmasked_update=True)
    body = result.to_json()["mask"]
    assert not body["masked"]
    assert 0.5 < body["hidden_share"] < 0.8
    assert lines(tmp_path / "plain")[1:] != lines(work / "semi-adapter")[1:]
    stock = AutoModelForCausalLM.from_pretrained(work / "semi", dtype=torch.float32)
    PeftModel.from_pretrained(stock, str(tmp_path / "plain"))
    checked: Any = loram.verify(tmp_path / "plain", numeric=True)
    assert checked.ok
    assert {check.name: check.detail for check in checked.checks}["mask"].endswith("training was not masked")
    # On a model without masks there is nothing to unmask: the option changes nothing.
    train(work, "large", tmp_path / "a", unmasked_update=True, steps=2)
    train(work, "large", tmp_path / "b", steps=2)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_eval_measures_the_small_model_under_its_mask(work: Path, tmp_path: Path) -> None:
    """What eval says of small + adapter is what training saw, and neither the unmasked update nor the bare model."""
    held = {"eval_data": work / "data.jsonl", "eval_every": 3, "recover_eval": 3}
    train(work, "semi", tmp_path / "watched", **held)
    watched = [line for line in lines(tmp_path / "watched") if "eval_loss" in line]
    plain = [{k: v for k, v in line.items() if not k.endswith("_loss")} for line in lines(tmp_path / "watched")]
    assert plain == lines(work / "semi-adapter")  # measuring changes nothing
    asked: dict[str, Any] = {"data": work / "data.jsonl", "dtype": "fp32"}
    small: Any = loram.evaluate(work / "semi", adapter=tmp_path / "watched", **asked)
    assert small.loss.mean == pytest.approx(watched[-1]["eval_loss"], rel=1e-5)
    loram.recover(tmp_path / "watched", out=tmp_path / "adapter")
    large: Any = loram.evaluate(work / "large", adapter=tmp_path / "adapter", **asked)
    assert large.loss.mean == pytest.approx(watched[-1]["large_loss"], rel=1e-5)
    recovered = recover_adapter(load_adapter(tmp_path / "watched"), read_map(work / "semi"), "it")
    streamed = StreamedModel(work / "large", 4, "fp32").measure(rows_of(work), recovered)
    assert summarize(streamed).mean == pytest.approx(large.loss.mean, rel=1e-5)
    streamed = StreamedModel(work / "semi", 4, "fp32").measure(rows_of(work), load_adapter(tmp_path / "watched"))
    assert summarize(streamed).mean == pytest.approx(small.loss.mean, rel=1e-5)
    stock = AutoModelForCausalLM.from_pretrained(work / "semi", dtype=torch.float32)
    unmasked = PeftModel.from_pretrained(stock, str(tmp_path / "adapter"))
    attached = attach_masked(
        load_model(work / "semi", dtype="fp32"),
        load_adapter(tmp_path / "watched"),
        read_map(work / "semi").mask_in_small,
    )
    assert (logits(unmasked) - logits(attached)).abs().max() > 1e-2
    ladder: Any = loram.evaluate(work / "large", adapter=tmp_path / "adapter", compare=True, **asked)
    assert len(ladder.to_json()["ladder"]["rows"]) == 4


def rows_of(work: Path) -> Any:
    return encode(read_sources((str(work / "data.jsonl"),), None, None), load_tokenizer(work / "semi"), 256)[0]


def refused(error: type[Exception], sentence: str, call: Any, *inputs: Any, **options: Any) -> None:
    with pytest.raises(error, match=sentence):
        call(*inputs, **options)


def test_what_a_masked_update_cannot_be(work: Path, tmp_path: Path) -> None:
    for name in ("lora_fa", "compile"):
        with pytest.raises(OptionError, match=rf"--{name.replace('_', '-')} .*or add --unmasked-update") as caught:
            train(work, "semi", tmp_path / "out", **{name: True})
        assert caught.value.exit_code == 2
    refused(OptionError, "--dora trains magnitudes", train, work, "semi", tmp_path / "out", dora=True)
    assert not list(tmp_path.iterdir())
    assert train(work, "semi", tmp_path / "out", lora_fa=True, unmasked_update=True, steps=2).path == tmp_path / "out"


def test_it_does_not_get_onto_another_model(work: Path, tmp_path: Path) -> None:
    """Also where nothing but PEFT's two files is left of it."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copyfile(work / "semi-adapter" / name, bare / name)
    data = work / "data.jsonl"
    refused(
        KindError, "is for the small model", loram.evaluate, work / "large", adapter=work / "semi-adapter", data=data
    )
    refused(MismatchError, "under masks and .*large has none", loram.evaluate, work / "large", adapter=bare, data=data)
    refused(KindError, "trained under the masks", loram.merge, bare, base=work / "large", out=tmp_path / "merged")
    refused(KindError, "trained under the masks", loram.project, bare, work / "semi", out=tmp_path / "small")
    refused(KindError, "not for others .*masked", loram.push, bare, to="a/b", large=work / "large", dry_run=True)
    other = work / "unstructured"
    refused(MismatchError, "with the pruning map", loram.evaluate, other, adapter=work / "semi-adapter", data=data)
    refused(OptionError, "add --small FOLDER", loram.recover, bare, out=tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]
    result: Any = loram.recover(bare, small=work / "semi", out=tmp_path / "adapter")
    assert result.to_json()["mask"] == loram.recover(work / "semi-adapter", out=tmp_path / "other").to_json()["mask"]
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == (tmp_path / "other" / WEIGHTS).read_bytes()


def test_merged_it_is_the_adapter_on_the_large_model(work: Path, tmp_path: Path) -> None:
    """W + s·B·A, whole: the large model has no mask."""
    loram.recover(work / "semi-adapter", out=tmp_path / "adapter")
    loram.merge(tmp_path / "adapter", out=tmp_path / "merged", dtype="fp32")
    stock = AutoModelForCausalLM.from_pretrained(work / "large", dtype=torch.float32)
    wanted = logits(PeftModel.from_pretrained(stock, str(tmp_path / "adapter")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_a_quantized_model_the_mask_stays(work: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    loram.quantize(work / "semi", out=tmp_path / "small", type=kind)
    assert read_map(tmp_path / "small").sha256 == read_map(work / "semi").sha256
    result = train(tmp_path, "small", tmp_path / "adapter", steps=3, data=work / "data.jsonl", dropout=0.0)
    assert result.to_json()["mask"]["masked"]
    adapter, pruning_map = load_adapter(tmp_path / "adapter"), read_map(tmp_path / "small")
    model = load_model(tmp_path / "small", dtype="fp32")
    bare = logits(model)
    masked: Any = attach_masked(model, adapter, pruning_map.mask_in_small)
    names = {type(part).__name__ for part in masked.modules() if hasattr(part, "keep_bits")}
    assert names == {"MaskedLinear4bit" if kind == "nf4" else "MaskedLinear8bitLt"}
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for module, pair in list(adapter.pairs.items())[:2]:
        layer = masked.get_submodule(PREFIX + module)
        update = pair.scale * (pair.b @ pair.a) * pruning_map.masks[f"{module}.weight"].unpack()
        piece = x[:, : update.shape[1]].repeat(1, -(-update.shape[1] // 64))[:, : update.shape[1]]
        torch.testing.assert_close(layer(piece) - layer.base_layer(piece), piece @ update.T, rtol=1e-3, atol=1e-3)
    assert (logits(masked) - bare).abs().max() > 1e-3
    loram.recover(tmp_path / "adapter", out=tmp_path / "large-adapter")
    checked: Any = loram.verify(tmp_path / "large-adapter", large=work / "large", numeric=True)
    assert checked.ok, checked.summary()
