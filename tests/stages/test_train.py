"""train from end to end on the committed model: what is written, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loram.artifact import find_location, read_manifest, sha256_file
from loram.errors import DataError, InputError, KindError, OptionError, OutputError
from loram.modeling import load_model
from loram.options import PruneOptions, RecoverOptions, TrainOptions, VerifyOptions
from loram.stages.prune import prune
from loram.stages.recover import recover
from loram.stages.train import train
from loram.stages.verify import verify

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a large model, a small one and some data."""
    folder = tmp_path_factory.mktemp("train")
    shutil.copytree(FIXTURE, folder / "large")
    prune(
        PruneOptions(model=str(folder / "large"), out=str(folder / "small"), method="random", keep_first=1, keep_last=1)
    )
    rows = [{"prompt": f"And the LORD said {number} ", "completion": "unto Moses"} for number in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(work: Path, out: Path, **changes: Any) -> TrainOptions:
    plain = {"model": str(work / "small"), "data": (str(work / "data.jsonl"),), "out": str(out), "steps": 4, "lr": 2e-3}
    return TrainOptions(**{**plain, "dtype": "fp32", **changes})


def test_a_small_adapter(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    result = train(options(work, out))
    manifest, small = read_manifest(out), read_manifest(work / "small")
    assert manifest is not None
    assert small is not None
    assert (manifest.kind, manifest.stage, manifest.family) == ("small-adapter", "train", "llama")
    assert manifest.compression == small.compression
    assert manifest.pruning_map_sha256 == small.pruning_map_sha256 == sha256_file(out / "pruning_map.safetensors")
    assert manifest.base is not None
    assert small.base is not None
    assert manifest.base.weights_fingerprint == small.base.weights_fingerprint
    assert (find_location(manifest.base.location, out) or out).resolve() == (work / "large").resolve()
    (parent,) = manifest.parents
    assert (parent.kind, parent.digest) == ("small-model", small.digest())
    assert (find_location(parent.location, out) or out).resolve() == (work / "small").resolve()
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "metrics.jsonl"} <= {
        file.name for file in out.iterdir()
    }
    assert not [file for file in out.iterdir() if file.suffix in (".bin", ".pt", ".md")]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    body = result.to_json()
    assert body["path"] == str(out)
    assert body["steps"] == len(lines) == 4
    assert body["loss"] == {"first": lines[0]["loss"], "last": lines[-1]["loss"]}
    assert body["tokens_per_second"] > 0
    assert body["peak_bytes"] > 0
    assert body["data"]["formats"] == ["prompt/completion"]
    assert result.next_command == f"loram recover {out} -o {out}-large"
    assert "4 steps: training loss" in str(result)


def test_the_adapter_is_an_ordinary_one_for_the_small_model(work: Path, tmp_path: Path) -> None:
    train(options(work, tmp_path / "adapter", steps=8))
    ids = torch.arange(10, 30).reshape(1, 20)
    model = load_model(work / "small", dtype="fp32").eval()
    plain = model(ids).logits
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()(ids).logits
    assert (adapted - plain).abs().max() > 1e-2


@pytest.mark.filterwarnings("error")
def test_same_seed_same_adapter(work: Path, tmp_path: Path) -> None:
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(options(work, tmp_path / name, seed=seed))
        states.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    first, same, other = states
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    digests = [manifest.digest() for name in "abc" if (manifest := read_manifest(tmp_path / name))]
    assert digests[0] == digests[1] != digests[2]


def test_lora_on_a_plain_model_is_an_adapter_of_it(work: Path, tmp_path: Path) -> None:
    result = train(options(work, tmp_path / "adapter", model=str(work / "large")))
    manifest = read_manifest(tmp_path / "adapter")
    assert manifest is not None
    assert (manifest.kind, manifest.parents, manifest.pruning_map_sha256) == ("adapter", (), None)
    assert manifest.base is not None
    assert (find_location(manifest.base.location, tmp_path / "adapter") or tmp_path).resolve() == work / "large"
    assert not (tmp_path / "adapter" / "pruning_map.safetensors").exists()
    assert result.next_command.startswith("loram verify")
    stock = AutoModelForCausalLM.from_pretrained(work / "large")
    PeftModel.from_pretrained(stock, str(tmp_path / "adapter"))


def test_dry_run_writes_nothing(work: Path, tmp_path: Path) -> None:
    result = train(options(work, tmp_path / "adapter", dry_run=True))
    assert result.path is None
    assert "nothing was trained" in str(result)
    assert not list(tmp_path.iterdir())


def broken(work: Path, name: str, content: str) -> tuple[str, ...]:
    (work / name).write_text(content)
    return (str(work / name),)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "gone"}, InputError, "gone does not exist"),
        ({"data": ()}, OptionError, "add --data FILE"),
        ({"data": ("gone.jsonl",)}, DataError, r"gone\.jsonl does not exist"),
        ({"max_length": 2}, DataError, "none of the 24 rows"),
        ({"targets": ("nothing",)}, OptionError, "'nothing', which no module"),
        ({"columns": "prompt=q,completion=completion"}, DataError, "no column q"),
    ],
)
def test_bad_input_writes_nothing(
    work: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(options(work, tmp_path / "adapter", **changes))
    assert not list(tmp_path.iterdir())


def test_broken_lines_and_missing_tokenizers(work: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"broken\.jsonl:2: broken JSON"):
        train(options(work, tmp_path / "a", data=broken(work, "broken.jsonl", '{"text": "a"}\n{"text\n')))
    chat = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        train(options(work, tmp_path / "a", data=broken(work, "chat.jsonl", chat)))
    bare = tmp_path / "bare"
    shutil.copytree(work / "large", bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(DataError, match="no usable tokenizer"):
        train(options(work, tmp_path / "a", model=str(bare)))
    assert not (tmp_path / "a").exists()


def test_wrong_kinds_and_outputs(work: Path, tmp_path: Path) -> None:
    train(options(work, tmp_path / "adapter", steps=1))
    with pytest.raises(KindError, match="is a small-adapter; `loram train` works on a small model"):
        train(options(work, tmp_path / "b", model=str(tmp_path / "adapter")))
    with pytest.raises(OutputError, match="exists and is not empty"):
        train(options(work, tmp_path / "adapter"))
    with pytest.raises(OutputError, match="is the input"):
        train(options(work, work / "small", force=True))
    train(options(work, tmp_path / "adapter", steps=1, force=True))


def test_packs_weights_and_long_rows(work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long_row = {"prompt": "And", "completion": " he said unto the people" * 20}
    (tmp_path / "more.jsonl").write_text(json.dumps(long_row) + "\n" + json.dumps({"prompt": "a", "completion": "b"}))
    data = (str(work / "data.jsonl") + "=0.5", str(tmp_path / "more.jsonl") + "=2")
    caplog.set_level("INFO")
    chosen = options(
        work, tmp_path / "out", data=data, packing=True, long="drop", max_length=40, batch=2, steps=None, epochs=1.0
    )
    result = train(chosen)
    assert (result.data.rows, result.data.too_long, result.data.cut) == (14, 2, 0)
    assert result.run is not None
    assert result.run.tokens == result.data.tokens
    assert result.run.steps < 7
    assert "packing: 14 rows in " in caplog.text


def test_data_that_is_an_input_may_carry_a_weight(work: Path) -> None:
    with pytest.raises(OutputError):
        train(options(work, work / "data.jsonl", data=(f"{work}/data.jsonl=2",), force=True))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_embeddings_patterns_and_layers_come_through_recover(work: Path, tmp_path: Path) -> None:
    """What is trained with the unusual options acts on the large model as the identity demands."""
    cases: list[dict[str, Any]] = [
        {"targets": ("all-linear", "embed_tokens"), "rank_pattern": ("q_proj=3",), "alpha_pattern": ("up_proj=4",)},
        {"layers": ("1-2",), "rslora": True, "init": "gaussian"},
    ]
    for number, changes in enumerate(cases):
        small, large = tmp_path / f"small-{number}", tmp_path / f"large-{number}"
        train(options(work, small, lr=0.02, steps=6, **changes))
        recover(RecoverOptions(adapter=str(small), out=str(large)))
        checked = verify(VerifyOptions(adapter=str(large), numeric=True))
        assert checked.ok, [check for check in checked.checks if not check.ok]
        stock = AutoModelForCausalLM.from_pretrained(work / "large", dtype=torch.float32)
        ids = torch.arange(10, 30).reshape(1, 20)
        plain = stock(ids).logits
        adapted = PeftModel.from_pretrained(stock, str(large)).eval()(ids).logits
        assert (adapted - plain).abs().max() > 1e-2
