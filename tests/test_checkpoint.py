"""Reading and writing safetensors by slice, against the safetensors package itself; damaged files refused."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_models import build, make
from torch import Tensor

from loram import stored as module
from loram.checkpoint import INDEX, SINGLE, Checkpoint, describe_base, read_header, read_metadata, read_tensors
from loram.checkpoint import tile_bounds as bounds
from loram.errors import CheckpointError, InputError
from loram.shards import ShardWriter, TensorPlan, index_of, plan_header, plan_shards

TENSORS = {
    "big": torch.randn(300, 7),
    "half": torch.randn(5, 3).half(),
    "brain": torch.randn(2, 3, 4).bfloat16(),
    "whole": torch.arange(6),
    "flags": torch.tensor([True, False]),
    "scalar": torch.tensor(3.5),
    "none": torch.zeros(0, 4),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_file(TENSORS, tmp_path / SINGLE, {"format": "pt"})
    return tmp_path


def test_whole_tensors_rows_and_tiles_are_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 128 * 7 * 4)
    with Checkpoint(folder) as checkpoint:
        assert set(checkpoint.entries) == set(TENSORS)
        for name, value in TENSORS.items():
            assert name in checkpoint
            assert torch.equal(checkpoint.read(name), value)
            pieces = [(start, tile.clone()) for start, tile in checkpoint.tiles(name)]
            if not value.dim():
                assert torch.equal(pieces[0][1], value)
            elif value.numel():
                assert torch.equal(torch.cat([tile for _, tile in pieces]), value)
            else:
                assert pieces == []
        assert [start for start, _ in checkpoint.tiles("big")] == [0, 128]
        assert torch.equal(checkpoint.rows("big", 3, 9), TENSORS["big"][3:9])
        assert checkpoint.total_bytes == sum(value.nbytes for value in TENSORS.values())
        with pytest.raises(CheckpointError, match=r"has no tensor other; the checkpoint is incomplete"):
            checkpoint.read("other")
    assert {key: value.tolist() for key, value in read_tensors(folder / SINGLE).items()} == {
        key: value.tolist() for key, value in TENSORS.items()
    }
    assert read_metadata(folder / SINGLE) == {"format": "pt"}


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 255, 256, 257, 384, 500, 1000])
@pytest.mark.parametrize("row_bytes", [0, 1, 2**17, 2**22])
def test_tiles_cover_every_row_once_and_none_is_short(rows: int, row_bytes: int) -> None:
    """A product of fewer than 128 rows may take another path through the BLAS, and give other bits."""
    tiles = bounds(rows, row_bytes)
    assert [row for start, stop in tiles for row in range(start, stop)] == list(range(rows))
    assert all(start % 128 == 0 for start, _ in tiles)
    if len(tiles) > 1:
        assert all(stop - start >= 128 for start, stop in tiles)


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    plans = [TensorPlan(name, value.dtype, tuple(value.shape)) for name, value in TENSORS.items()]
    with ShardWriter(tmp_path / "x.safetensors", plan_header(plans)) as writer:
        for value in TENSORS.values():
            for row in value.split(100) if value.dim() else [value]:
                writer.write(row)
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in TENSORS.items())
    assert writer.sha256 == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()


def test_tensors_are_dealt_to_shards() -> None:
    plans = [TensorPlan(str(i), torch.float32, (size,)) for i, size in enumerate([10, 10, 30, 1, 1])]
    shards = plan_shards(plans, 80)
    assert [[plan.name for plan in group] for group in shards.values()] == [["0", "1"], ["2"], ["3", "4"]]
    assert list(shards) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = index_of(shards)
    assert index["metadata"]["total_size"] == 52 * 4
    assert index["weight_map"]["2"] == "model-00002-of-00003.safetensors"
    assert list(plan_shards(plans, 10**6)) == [SINGLE]


def test_sharded_checkpoints_read_like_single_ones(tmp_path: Path) -> None:
    build("llama-gqa", tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    with Checkpoint(tmp_path / "sharded") as checkpoint:
        for name, value in make("llama-gqa").state_dict().items():
            assert torch.equal(checkpoint.read(name), value)


def test_the_fingerprint_changes_with_the_weights(stock: Callable[[str], Path], tmp_path: Path) -> None:
    first = build("llama-gqa", tmp_path / "a")
    base = describe_base(first, seen_from=tmp_path)
    assert base.location == "a"
    assert base.weights_fingerprint == describe_base(stock("llama-gqa")).weights_fingerprint
    assert base.weights_fingerprint != describe_base(stock("llama-mqa")).weights_fingerprint
    data = bytearray((first / SINGLE).read_bytes())
    data[-1] ^= 1
    (first / SINGLE).write_bytes(data)
    assert describe_base(first).weights_fingerprint != base.weights_fingerprint


@pytest.mark.parametrize(
    ("named", "place", "expected"),
    [
        ("org/name", "x", "org/name"),
        ("/abs/path", "x", None),
        ("", "models--org--name/snapshots/abc123", "org/name"),
        ("", "plain", None),
    ],
)
def test_the_id_is_the_hubs_where_it_can_be_told(named: str, place: str, expected: str | None, tmp_path: Path) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_name_or_path": named}))
    save_file({"x": torch.ones(1)}, folder / SINGLE)
    base = describe_base(folder)
    assert base.id == (expected or str(folder))
    assert base.revision == ("abc123" if "snapshots" in place else None)
    assert describe_base(folder, "my/id", "rev").id == "my/id"


def header(**changes: Any) -> bytes:
    info = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    raw = json.dumps({"x": {k: v for k, v in info.items() if v is not None}}).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty, truncated, or not safetensors"),
        (b"\x00" * 8, "empty, truncated, or not safetensors"),
        (b"\xff" * 64, "empty, truncated, or not safetensors"),
        (b"PK\x03\x04" + bytes(60), "is a pickle"),
        (b"\x80\x04\x95" + bytes(60), "is a pickle"),
        (b"\x80\x02}q" + bytes(60), "is a pickle"),
        (struct.pack("<Q", 4) + b"nope", "damaged header"),
        (struct.pack("<Q", 2) + b"[]", "damaged header"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "damaged header"),
        (header(dtype="F3"), "damaged header"),
        (header(dtype=None), "damaged header"),
        (header(shape=None), "damaged header"),
        (header(shape=3), "damaged header"),
        (header(shape=["a"]), "the file is damaged"),
        (header(data_offsets=[0]), "damaged header"),
        (header(data_offsets=[0, 4]), "contradicts itself"),
        (header(data_offsets=[-8, 0]), "contradicts itself"),
        (header(shape=[4], data_offsets=[0, 16]), "is truncated"),
        (header(shape=[-1, -2]), "the file is damaged"),
    ],
)
def test_damaged_files_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("size", [0, 5, 30, -1])
def test_truncated_models_are_refused(folder: Path, size: int) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:size])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint(folder)


def test_a_file_cut_while_it_is_read_is_noticed(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-100])
        last = max(checkpoint.entries.values(), key=lambda entry: entry.end).name
        with pytest.raises(CheckpointError, match="it is truncated"):
            checkpoint.read(last)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"big": "gone.safetensors"}}, "names the shard gone.safetensors, which is not in"),
        ({"weight_map": {"more": SINGLE}}, f"says that {SINGLE} holds more, and it does not"),
        ({"weight_map": {"big": "../x.safetensors"}}, "not a plain file name"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_must_be_true(folder: Path, index: Any, message: str) -> None:
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        Checkpoint(tmp_path / "gone")
    with pytest.raises(InputError, match=r"config.json does not exist"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no model.safetensors"):
        Checkpoint(tmp_path)
    tensors: dict[str, Tensor] = {"x": torch.ones(1)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle, which loram never reads"):
        Checkpoint(tmp_path)


def test_a_header_of_640_bytes_is_no_pickle(tmp_path: Path) -> None:
    """Its length, 0x0280, is written as a pickle of protocol 2 begins."""
    file = tmp_path / "long.safetensors"
    padding = 640 - (len(plan_header([TensorPlan("x", torch.uint8, (3,))], {"p": ""})) - 8)
    file.write_bytes(plan_header([TensorPlan("x", torch.uint8, (3,))], {"p": "-" * padding}) + b"abc")
    assert file.read_bytes()[:2] == b"\x80\x02"
    assert read_tensors(file)["x"].tolist() == [97, 98, 99]
