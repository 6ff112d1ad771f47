"""Streamed training: the same steps to the last bit, with one layer's weights in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stock_models import VARIANTS

import loram
from loram.blockwise import BlockRunner
from loram.data.encoding import EncodedRow
from loram.errors import CheckpointError, OptionError
from loram.modeling import load_model
from loram.options import TrainOptions
from loram.training.loop import fit
from loram.training.lora import wrap
from loram.training.streamed import streamed_model
from loram.training.trainer import adapter_state

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
WEIGHTS = "adapter_model.safetensors"


def rows(vocabulary: int, count: int = 6) -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(0)
    found: list[EncodedRow] = []
    for number in range(count):
        ids = torch.randint(3, vocabulary, (7 + number,), generator=generator).tolist()
        found.append({"input_ids": ids, "loss_mask": [position > 2 for position in range(len(ids))]})
    return found


def trained(model: Any, vocabulary: int, folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    options = TrainOptions(
        model="m", data=("d",), out="o", **{"steps": 3, "batch": 2, "lr": 1e-2, "dtype": "fp32", **changes}
    )
    wrapped = wrap(model, options)
    folder.mkdir()
    fit(wrapped, rows(vocabulary), options, folder)
    return adapter_state(wrapped)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_the_steps_of_every_family_are_those_of_the_whole_model(
    name: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = load_model(stock(name), dtype="fp32")
    vocabulary = int(whole.config.vocab_size)
    expected = trained(whole, vocabulary, tmp_path / "whole")
    with streamed_model(stock(name), "fp32") as model:
        found = trained(model, vocabulary, tmp_path / "streamed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert max(float(value.abs().max()) for key, value in found.items() if "lora_B" in key) > 1e-3


def test_one_layer_at_a_time(stock: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    sizes = {name: value.numel() for name, value in load_model(stock("llama-gqa")).named_parameters()}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    head, norm = sizes["lm_head.weight"], sizes["model.norm.weight"]
    filled = BlockRunner.filled

    def watched(self: BlockRunner, module: Any, state: dict[str, torch.Tensor]) -> Any:
        others = [p for name, p in self.model.named_parameters() if "lora_" not in name]
        held.append(sum(p.numel() for p in others) + sum(value.numel() for value in state.values()))
        return filled(self, module, state)

    monkeypatch.setattr(BlockRunner, "filled", watched)
    with streamed_model(stock("llama-gqa"), "fp32") as model:
        trained(model, int(model.config.vocab_size), tmp_path / "run")
        left = [p.numel() for name, p in model.named_parameters() if "lora_" not in name]
    layers = int(model.config.num_hidden_layers)
    assert max(held) == max(layer, head) + norm
    assert len(held) == 3 * (2 * layers + 2), "embeddings, every layer twice, and the head once a step"
    assert sum(left) == norm


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large model, small ones of several kinds, and data."""
    folder = tmp_path_factory.mktemp("streamed")
    shutil.copytree(FIXTURE, folder / "large")
    lines = [{"prompt": f"And the LORD said {n} ", "completion": "unto Moses " * (1 + n % 3)} for n in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loram.prune(folder / "large", out=folder / "small", method="random", keep_first=1, keep_last=1)
    loram.prune(folder / "large", out=folder / "semi", method="semi", score="magnitude")
    return folder


def train(work: Path, model: str, out: Path, **changes: Any) -> Any:
    plain: dict[str, Any] = {"steps": 4, "lr": 5e-3, "batch": 4, "data": (str(work / "data.jsonl"),)}
    return loram.train(work / model, out=out, **{**plain, **changes})


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("large", {"dtype": "bf16"}),
        ("small", {"dtype": "fp32", "lora_plus_ratio": 4.0}),
        ("semi", {"dtype": "fp32"}),
        ("large", {"dtype": "fp32", "targets": ("all-linear", "embed_tokens")}),
        ("large", {"dtype": "fp32", "packing": True, "max_length": 64, "lora_fa": True}),
        ("large", {"dtype": "bf16", "neftune": 5.0, "accumulate": 2}),
        ("large", {"dtype": "fp32", "eval_split": 3, "eval_every": 2, "patience": 1}),
    ],
)
def test_every_way_of_training_is_the_same(model: str, changes: dict[str, Any], work: Path, tmp_path: Path) -> None:
    train(work, model, tmp_path / "whole", **changes)
    train(work, model, tmp_path / "streamed", streamed=True, **changes)
    expected, found = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "streamed"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_what_is_refused(work: Path, tmp_path: Path) -> None:
    loram.quantize(work / "large", out=tmp_path / "nf4")
    for model, changes, message in (
        (tmp_path / "nf4", {}, "is quantized; leave it out"),
        ("large", {"compile": True}, "leave out --compile"),
        ("large", {"dtype": "fp16"}, "leave out --dtype fp16"),
        ("large", {"targets": ("q_proj", "lm_head")}, "leave lm_head out of --targets"),
    ):
        with pytest.raises(OptionError, match=message):
            train(work, str(model), tmp_path / "out", streamed=True, **changes)
    assert not (tmp_path / "out").exists()


def test_a_truncated_shard(work: Path, tmp_path: Path) -> None:
    place = shutil.copytree(work / "large", tmp_path / "large")
    (file,) = place.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError):
        train(tmp_path, "large", tmp_path / "out", streamed=True, data=(str(work / "data.jsonl"),))
    assert not (tmp_path / "out").exists()
