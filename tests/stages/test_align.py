"""align: what each method does to the weights, what stays as it was, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import write_small_folder
from torch import Tensor

from loram.artifact import read_manifest
from loram.checkpoint import Checkpoint
from loram.errors import DataError, InputError, KindError, LoramError, MismatchError, OptionError
from loram.masks import masked
from loram.modeling import load_model, load_small
from loram.options import AlignOptions, PruneOptions, RecoverOptions, TrainOptions, VerifyOptions
from loram.pruning_map import read_map
from loram.stages.align import AlignResult, align
from loram.stages.prune import prune
from loram.stages.recover import recover
from loram.stages.train import train
from loram.stages.verify import verify
from loram.training.scopes import add_lora, merged_lora

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
TEXT = "".join(
    f"And the LORD said unto Moses, number {n} of the children of Israel shall go up to the land of {n % 7} rivers. "
    for n in range(600)
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large model, a small one that was cut at random and not repaired, and text."""
    folder = tmp_path_factory.mktemp("align")
    shutil.copytree(FIXTURE, folder / "large")
    prune(
        PruneOptions(model=str(folder / "large"), out=str(folder / "small"), method="random", keep_first=1, keep_last=1)
    )
    (folder / "text.txt").write_text(TEXT)
    return folder


def options(work: Path, out: Path, **changes: Any) -> AlignOptions:
    plain = {"model": str(work / "small"), "out": str(out), "data": (str(work / "text.txt"),), "length": 32}
    running = {
        "method": "distill",
        "dtype": "fp32",
        "batch": 2,
        "steps": 12,
        "samples": 12,
        "held_out": 6,
        "log_every": 1,
    }
    return AlignOptions(**{**plain, **running, **changes})


def weights(folder: Path) -> dict[str, Tensor]:
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.entries}


def changed(work: Path, out: Path) -> set[str]:
    before, after = weights(work / "small"), weights(out)
    assert list(before) == list(after)
    assert all(before[name].dtype == after[name].dtype for name in before)
    return {name for name in before if not torch.equal(before[name], after[name])}


LEARNING: list[dict[str, Any]] = [
    {"method": "lm"},
    {"method": "distill"},
    {"method": "distill", "temperature": 2.0, "hidden_weight": 0.5, "accumulate": 2, "checkpointing": True},
    {"method": "lm", "scope": "lora", "rank": 4},
    {"method": "distill", "scope": "norms"},
]


@pytest.mark.parametrize("how", LEARNING, ids=lambda how: "-".join(map(str, how.values())))
def test_the_loss_falls_and_the_rest_stays(work: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    before = {file.name: file.read_bytes() for file in (work / "small").iterdir()}
    result = align(options(work, tmp_path / "out", **how))
    assert isinstance(result, AlignResult)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < sum(losses[:3])
    if how["method"] == "lm":
        assert result.after < result.before  # type: ignore[operator]
    body = result.to_json()
    assert body["path"] == str(tmp_path / "out")
    assert body["loss"] == {"before": result.before, "after": result.after}
    assert {file.name: file.read_bytes() for file in (work / "small").iterdir()} == before
    out = tmp_path / "out"
    for name in ("config.json", "pruning_map.safetensors", "tokenizer.json"):
        assert (out / name).read_bytes() == before[name]
    small, aligned = read_manifest(work / "small"), read_manifest(out)
    assert small is not None
    assert aligned is not None
    assert (aligned.kind, aligned.stage, aligned.pruning_map_sha256) == (
        "small-model",
        "align",
        small.pruning_map_sha256,
    )
    assert aligned.compression == (*small.compression, "aligned")
    assert aligned.base is not None
    assert small.base is not None
    assert aligned.base.weights_fingerprint == small.base.weights_fingerprint
    assert [parent.digest for parent in aligned.parents] == [small.digest()]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert set(lines[0]) == {"step", "loss", "lr", "tokens", "seconds"}
    assert lines[-1]["tokens"] == 12 * 2 * how.get("accumulate", 1) * 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_what_each_scope_trains(work: Path, tmp_path: Path) -> None:
    """The head is never trained; where it is the embedding as well, the embedding is not either."""
    every = set(weights(work / "small"))
    tied = json.loads((work / "small" / "config.json").read_text())["tie_word_embeddings"]
    fixed = {"model.embed_tokens.weight"} if tied else {"lm_head.weight"}
    align(options(work, tmp_path / "all", method="lm", steps=2, lr=0.02))
    assert changed(work, tmp_path / "all") == every - fixed
    align(options(work, tmp_path / "lora", method="lm", scope="lora", steps=2))
    assert changed(work, tmp_path / "lora") == {name for name in every if "_proj" in name}
    align(options(work, tmp_path / "norms", method="lm", scope="norms", steps=2, lr=0.02))
    assert changed(work, tmp_path / "norms") == {name for name in every if "norm" in name}


@pytest.mark.parametrize("name", ["qwen2-gqa", "llama-mha", "gemma3_text-gqa", "phi3-gqa"])
@pytest.mark.parametrize("how", [{}, {"hidden_weight": 1.0, "temperature": 3.0}])
def test_a_student_that_is_its_teacher_is_left_alone(
    stock: Any, name: str, how: dict[str, Any], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was cut, so large and small agree to the bit: no divergence, no gradient, no change."""
    write_small_folder(stock(name), {}, tmp_path / "small")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(FIXTURE / file, tmp_path / "small" / file)
    chosen = options(work, tmp_path / "out", model=str(tmp_path / "small"), steps=3, length=16, **how)
    small_vocabulary(monkeypatch)
    align(chosen)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert losses == [0, 0, 0]
    before, after = weights(tmp_path / "small"), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def small_vocabulary(patch: pytest.MonkeyPatch) -> None:
    """Token ids that the stock models of the tests have embeddings for."""
    from loram.data import calibration

    real = calibration.encode_example
    patch.setattr(
        calibration,
        "encode_example",
        lambda example, tokenizer: {
            **real(example, tokenizer),
            "input_ids": [3 + token % 60 for token in real(example, tokenizer)["input_ids"]],
        },
    )


def test_lora_is_merged_in_fp32(work: Path, tmp_path: Path) -> None:
    """What is written behaves as what was trained: the measured loss is that of the trained model."""
    result = align(options(work, tmp_path / "out", method="lm", scope="lora", steps=12, lr=5e-3, held_out=8))
    model = load_small(tmp_path / "out", dtype="fp32")
    assert all("lora" not in name for name, _ in model.named_parameters())
    assert result.after < result.before - 0.05  # type: ignore[operator]


def test_train_recover_verify_take_the_aligned_model(work: Path, tmp_path: Path) -> None:
    align(options(work, tmp_path / "out", method="lm", steps=2))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": TEXT[n * 60 : n * 60 + 80]}) + "\n" for n in range(8)))
    train(
        TrainOptions(
            model=str(tmp_path / "out"), data=(str(data),), out=str(tmp_path / "small-adapter"), steps=2, dtype="fp32"
        )
    )
    recover(RecoverOptions(adapter=str(tmp_path / "small-adapter"), out=str(tmp_path / "adapter")))
    result = verify(VerifyOptions(adapter=str(tmp_path / "adapter"), small=str(tmp_path / "out"), numeric=True))
    assert result.exit_code == 0, result.summary()
    manifest = read_manifest(tmp_path / "small-adapter")
    assert manifest is not None
    assert manifest.compression == ("axes", "aligned")
    assert read_map(tmp_path / "out").sha256 == manifest.pruning_map_sha256


def test_sources_are_mixed_and_builtin_is_what_is_taken_alone(work: Path, tmp_path: Path) -> None:
    result = align(options(work, tmp_path / "out", method="lm", steps=1, data=(), dry_run=True))
    assert any("aligned on general text only" in note for note in result.notes)
    assert result.to_json()["path"] is None
    assert "nothing was aligned" in result.summary()
    (tmp_path / "short.txt").write_text(TEXT[:1500])
    result = align(
        options(
            work, tmp_path / "out", method="lm", steps=40, data=(f"{tmp_path / 'short.txt'}=2", "builtin"), dry_run=True
        )
    )
    assert any("times on average" in note for note in result.notes)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def refused(work: Path, tmp_path: Path, error: type[LoramError], sentence: str, **changes: Any) -> None:
    with pytest.raises(error, match=sentence) as caught:
        align(options(work, tmp_path / "out", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_bad_input_is_refused_with_a_sentence(work: Path, tmp_path: Path) -> None:
    refused(work, tmp_path, KindError, "is not a folder that loram wrote; `loram align`", model=str(work / "large"))
    refused(work, tmp_path, InputError, "does not exist", model=str(tmp_path / "nothing"))
    refused(work, tmp_path, InputError, "does not exist", data=(str(tmp_path / "nothing.txt"),))
    (tmp_path / "short.txt").write_text("In the beginning")
    refused(work, tmp_path, DataError, "less than one window of 32", data=(str(tmp_path / "short.txt"),))
    (tmp_path / "short.txt").write_text(TEXT[:300])
    refused(work, tmp_path, DataError, "too few to hold any out", data=(str(tmp_path / "short.txt"),))
    refused(work, tmp_path, MismatchError, "the loss became .* with --lr 1e\\+20", lr=1e20, clip=0.0)
    shutil.copytree(work / "small", tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    refused(work, tmp_path, KindError, "align first, then quantize", model=str(tmp_path / "quantized"))


def test_the_large_model_must_be_there_and_be_the_one(work: Path, tmp_path: Path, stock: Any) -> None:
    shutil.copytree(work / "small", tmp_path / "elsewhere" / "small")
    lost = {"model": str(tmp_path / "elsewhere" / "small"), "method": "distill"}
    refused(work, tmp_path, InputError, "was not found; give it with --large", **lost)
    refused(work, tmp_path, MismatchError, "has the weights", large=str(stock("llama-gqa")), **lost)
    assert align(options(work, tmp_path / "out", large=str(work / "large"), steps=1, **lost)).path == tmp_path / "out"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "distil"}, "did you mean distill"),
        ({"scope": "lora", "method": "refit"}, "--scope lora is for lm and distill"),
        ({"teacher_cache": "x", "method": "lm"}, "--teacher-cache is for --method distill"),
        ({"hidden_weight": 1.0, "method": "lm"}, "--hidden-weight is for --method distill"),
        ({"refit_all": True}, "--refit-all is for --method refit"),
        ({"temperature": 0.0}, "--temperature is 0.0; it must be more than 0"),
        ({"top_k": 0}, "--top-k is 0"),
        ({"steps": 0}, "--steps is 0"),
        ({"lr": -1.0}, "--lr is -1.0"),
        ({"length": 1}, "--length is 1"),
    ],
)
def test_impossible_options(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        AlignOptions(model="x", **changes)


@pytest.mark.parametrize(
    "how", [*LEARNING[:1], *LEARNING[3:], {"method": "refit", "refit_all": True}, {"method": "block"}]
)
def test_masked_zeros_stay_zero(stock: Any, tmp_path: Path, how: dict[str, Any], work: Path) -> None:
    """What a mask drops is zero before and after; the rest changes. Axes, masks and dropped layers together."""
    large = tmp_path / "large"
    shutil.copytree(work / "large", large)
    draw = torch.Generator().manual_seed(3)
    masks = {}
    with Checkpoint(large) as checkpoint:
        for name, entry in checkpoint.entries.items():
            if "layers.1." in name and "_proj" in name:
                masks[name] = torch.rand(entry.shape, generator=draw) < 0.5
    kept = {3: ([0], list(range(200)))}
    small = write_small_folder(large, kept, tmp_path / "small", layers=(0, 1, 3), masks=masks)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(FIXTURE / file, small / file)
    align(options(work, tmp_path / "out", model=str(small), **{"lr": 5e-3, "steps": 4, **how}))
    before, after = weights(small), weights(tmp_path / "out")
    for name, mask in masks.items():
        assert not before[name][~mask].any()
        assert not after[name][~mask].any()
        if how.get("scope") != "norms":
            assert not torch.equal(before[name][mask], after[name][mask])
    assert read_map(tmp_path / "out").sha256 == read_map(small).sha256
    small_of = read_manifest(small)
    aligned = read_manifest(tmp_path / "out")
    assert small_of is not None
    assert aligned is not None
    assert aligned.compression == (*small_of.compression, "refit" if how["method"] == "refit" else "aligned")


def test_lora_is_masked_while_it_is_trained_too(work: Path, tmp_path: Path) -> None:
    """Step by step, aligning by LoRA is what the written weights will be: W ∘ M + (s·B·A) ∘ M."""
    draw, masks = torch.Generator().manual_seed(3), {}
    with Checkpoint(work / "large") as checkpoint:
        for name, entry in checkpoint.entries.items():
            if "_proj" in name:
                masks[name] = torch.rand(entry.shape, generator=draw) < 0.5
    small = write_small_folder(work / "large", {}, tmp_path / "small", masks=masks)
    pruning_map = read_map(small)
    ids = torch.arange(10, 40).reshape(2, 15)
    model = load_model(small, dtype="fp32")
    factors = add_lora(model, 4, 1, pruning_map.mask_in_small)
    with torch.no_grad():
        for value in factors.values():
            value.copy_(torch.randn(value.shape, generator=draw) * 0.1)
        found = model.eval()(ids, use_cache=False).logits
        with Checkpoint(small) as checkpoint:
            merged = merged_lora(factors, checkpoint)
        twin = load_model(small, dtype="fp32")
        twin.load_state_dict({n: masked(value, masks[n]) for n, value in merged.items()}, strict=False)
        torch.testing.assert_close(found, twin(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
        twin.load_state_dict(merged, strict=False)
        assert (twin(ids, use_cache=False).logits - found).abs().max() > 0.1


@pytest.mark.parametrize("how", [{"method": "refit"}, {"method": "refit", "refit_all": True}, {"method": "block"}])
def test_layers_are_repaired_in_the_whole_stage(work: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    result = align(options(work, tmp_path / "out", **how))
    touched = changed(work, tmp_path / "out")
    assert {int(name.split(".")[2]) for name in touched} == {1, 2}
    if how == {"method": "refit"}:
        assert {name.split(".")[-2] for name in touched} == {"o_proj", "down_proj"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[3]["loss"] > 0
    assert all(line["loss"] <= line["error_before"] for line in lines)
    assert result.after is not None


@pytest.mark.parametrize(("before", "after", "worse"), [(3.0, 2.9, False), (3.0, 3.0, True), (3.0, float("nan"), True)])
def test_a_model_that_did_not_get_better_is_not_passed_over(before: float, after: float, worse: bool) -> None:
    text = AlignResult(before=before, after=after).summary()
    assert text.startswith("the small model's held-out loss: 3.000 → ")
    assert ("train on the model that was given" in text) == worse
