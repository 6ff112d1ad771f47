"""Hub ids and ID@REVISION wherever an adapter is, from a Hub on loopback through the real client."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub
from hub_client import Answer, Client

import loram
from loram.artifact import read_manifest
from loram.hub.download import resolve_artifact

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
WEIGHTS = "adapter_model.safetensors"


class Stage:
    """A Hub that has the base, a small adapter and the recovered one; and the same in `local`."""

    def __init__(self, hub: FakeHub, client: Client, folder: Path) -> None:
        self.hub, self.client, self.folder = hub, client, folder
        local = folder / "local"
        shutil.copytree(TINY, local / "base")
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps({"prompt": "In the", "completion": f" beginning {n}"}) + "\n" for n in "ab"))
        cut = {"method": "random", "ratio": 0.5, "keep_first": 1, "keep_last": 1, "refit": False}
        loram.prune(local / "base", out=local / "small", base_id="acme/tiny", **cut)
        loram.train(local / "small", data=data, out=local / "trained", steps=2, lr=1e-2)
        loram.recover(local / "trained", out=local / "adapter")
        self.base = self.add("acme/tiny", "base")
        self.adapter = self.add("me/adapter", "adapter")
        self.trained = self.add("me/trained", "trained")
        self.add("me/small", "small")
        hub.add("me/adapter", {WEIGHTS: b"of another commit"})

    def add(self, name: str, folder: str) -> str:
        place = self.folder / "local" / folder
        return self.hub.add(name, {file.name: file.read_bytes() for file in place.iterdir() if file.is_file()})

    def __call__(self, *words: str | Path, token: str | None = TOKEN) -> Answer:
        return self.client(*words, token=token, folder=self.folder)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with FakeHub() as hub:
        client = Client(hub.url, tmp_path_factory.mktemp("home"))
        yield Stage(hub, client, tmp_path_factory.mktemp("work"))
        client.close()


def test_recover_and_project(stage: Stage) -> None:
    local = stage.folder / "local"
    answer = stage("recover", "me/trained", "-o", "recovered")
    assert answer.code == 0, answer.err
    assert (stage.folder / "recovered" / WEIGHTS).read_bytes() == (local / "adapter" / WEIGHTS).read_bytes()
    manifest = read_manifest(stage.folder / "recovered")
    assert manifest is not None
    assert manifest.options["adapter"] == "me/trained"
    answer = stage("project", f"me/adapter@{stage.adapter}", "me/small", "-o", "projected")
    assert answer.code == 0, answer.err
    assert (stage.folder / "projected" / WEIGHTS).read_bytes() == (local / "trained" / WEIGHTS).read_bytes()


def test_verify_merge_and_eval(stage: Stage) -> None:
    local, name = stage.folder / "local", f"me/adapter@{stage.adapter}"
    answer = stage("verify", name, "--large", "acme/tiny", "--small", "me/small", "--numeric")
    assert answer.code == 0, answer.out + answer.err
    assert "ok   identity" in answer.out
    assert f"loram merge {name} -o MERGED" in answer.out
    answer = stage("merge", name, "-o", "merged")
    assert answer.code == 2
    assert "add --base FOLDER or --base acme/tiny to fetch it" in answer.err
    answer = stage("merge", name, "--base", "acme/tiny", "-o", "merged")
    assert answer.code == 0, answer.err
    loram.merge(local / "adapter", out=local / "merged")
    one, other = ((place / "merged" / "model.safetensors").read_bytes() for place in (stage.folder, local))
    assert one == other
    answer = stage("eval", "acme/tiny", "--adapter", name, "--data", "rows.jsonl", "--json")
    assert answer.code == 0, answer.err
    found = loram.evaluate(local / "base", adapter=local / "adapter", data=stage.folder / "rows.jsonl").to_json()
    assert answer.json["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert answer.json["subject"] == f"acme/tiny + adapter {name}"


def test_the_ladder_of_what_is_on_the_hub(stage: Stage) -> None:
    places = ("--small", "me/small", "--small-adapter", "me/trained", "--adapter", f"me/adapter@{stage.adapter}")
    answer = stage("eval", "acme/tiny", "--compare", *places, "--data", "rows.jsonl", "--json")
    assert answer.code == 0, answer.err
    rungs = [row["name"] for row in answer.json["ladder"]["rows"]]
    assert rungs == ["base", "small", "small + adapter", "large + recovered"]


def test_push_of_an_adapter_on_the_hub(stage: Stage) -> None:
    answer = stage("push", f"me/adapter@{stage.adapter}", "--to", "me/copy", "--large", "acme/tiny", "--license", "mit")
    assert answer.code == 0, answer.err
    assert stage.hub.files("me/copy")[WEIGHTS] == (stage.folder / "local" / "adapter" / WEIGHTS).read_bytes()


def test_another_commit_is_another_adapter(stage: Stage) -> None:
    answer = stage("verify", "me/adapter")
    assert answer.code == 4
    assert "is truncated or no safetensors file" in answer.err or WEIGHTS in answer.err


@pytest.mark.parametrize(
    ("name", "code", "sentence"),
    [
        ("me/none", 5, "the Hub has no me/none"),
        ("me/adapter@never", 5, "has no such revision (404)"),
        ("local/none", 4, "local/none does not exist"),
        ("./me/adapter", 4, "does not exist"),
    ],
)
def test_what_is_not_there(stage: Stage, name: str, code: int, sentence: str) -> None:
    for verb in (
        ("recover", name, "-o", "x"),
        ("merge", name, "-o", "x"),
        ("verify", name),
        ("push", name, "--to", "me/x"),
    ):
        answer = stage(*verb)
        assert answer.code == code, answer.err
        assert sentence in answer.err


def test_a_path_beside_its_folder_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert resolve_artifact("runs/adapter") == Path("runs/adapter")
