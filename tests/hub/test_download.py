"""Hub ids and ID@REVISION wherever a model is, from a Hub on loopback through the real client."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import DROP, TOKEN, FakeHub
from hub_client import Answer, Client

import loram
from loram.artifact import read_json, read_manifest
from loram.checkpoint import describe_base
from loram.errors import InputError, OptionError
from loram.hub.download import resolve_model, split_id

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
CUT = ("--method", "random", "--ratio", "0.5", "--keep-first", "1", "--keep-last", "1", "--no-refit")


class Stage:
    """A Hub with two commits of acme/tiny (the second has other weights) and a client with an empty cache."""

    def __init__(self, hub: FakeHub, client: Client, folder: Path) -> None:
        self.hub, self.client, self.folder = hub, client, folder
        files = {file.name: file.read_bytes() for file in TINY.iterdir() if file.is_file()}
        self.first = hub.add("acme/tiny", files)
        self.second = hub.add("acme/tiny", {"model.safetensors": disturbed(files["model.safetensors"])})

    def __call__(self, *words: str | Path, token: str | None = None) -> Answer:
        return self.client(*words, token=token, folder=self.folder)


def disturbed(weights: bytes) -> bytes:
    """The same tensors with one bit of one number changed."""
    start = 8 + struct.unpack("<Q", weights[:8])[0]
    return weights[:start] + bytes([weights[start] ^ 1]) + weights[start + 1 :]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with FakeHub() as hub:
        client = Client(hub.url, tmp_path_factory.mktemp("home"))
        yield Stage(hub, client, tmp_path_factory.mktemp("work"))
        client.close()


@pytest.fixture(autouse=True)
def healthy(stage: Stage) -> Iterator[None]:
    yield
    stage.hub.failures.clear()


def base_of(folder: Path) -> Any:
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.base is not None
    return manifest.base


def test_plan_fetches_no_weights(stage: Stage) -> None:
    answer = stage("plan", "acme/tiny", "--keep-first", "1", "--keep-last", "1", "--json")
    assert answer.code == 0, answer.err
    local: Any = loram.plan(TINY, keep_first=1, keep_last=1)
    assert answer.json["params"] == json.loads(json.dumps(local.to_json()["params"]))
    assert not [path for _, path in stage.hub.requests if path.endswith(".safetensors")]


@pytest.fixture(scope="module")
def made(stage: Stage) -> Path:
    """prune, train, recover, verify, merge and eval, all at the first commit, the last but one on the Hub."""
    folder, model = stage.folder, f"acme/tiny@{stage.first}"
    (folder / "data.jsonl").write_text('{"prompt": "In the", "completion": " beginning"}\n')
    data = ("--data", "data.jsonl")
    for line in (
        ("prune", model, "-o", "small", *CUT),
        ("train", "small", *data, "-o", "trained", "--steps", "2", "--lr", "1e-2"),
        ("recover", "trained", "-o", "adapter"),
        ("verify", "adapter", "--large", model, "--numeric"),
        ("merge", "adapter", "--base", model, "-o", "merged"),
        ("eval", model, *data, "--adapter", "adapter"),
        ("train", model, *data, "-o", "direct", "--steps", "1"),
    ):
        answer = stage(*line)
        assert answer.code == 0, f"{line}: {answer.out}{answer.err}"
    return folder


def test_every_stage_takes_an_id_with_a_revision(made: Path, stage: Stage) -> None:
    folder = made
    here = describe_base(TINY)
    for name in ("small", "adapter", "direct"):
        base = base_of(folder / name)
        assert (base.id, base.revision) == ("acme/tiny", stage.first)
        assert (base.weights_fingerprint, base.config_sha256) == (here.weights_fingerprint, here.config_sha256)
    assert base_of(folder / "merged").weights_fingerprint == here.weights_fingerprint
    assert read_json(folder / "adapter" / "adapter_config.json")["base_model_name_or_path"] == "acme/tiny"
    assert read_json(folder / "direct" / "adapter_config.json")["base_model_name_or_path"] == "acme/tiny"
    loram.prune(TINY, out=folder / "local", method="random", ratio=0.5, keep_first=1, keep_last=1, refit=False)
    cut = "pruning_map.safetensors"
    assert (folder / "local" / cut).read_bytes() == (folder / "small" / cut).read_bytes()


def test_another_revision_is_another_base(made: Path, stage: Stage) -> None:
    answer = stage("verify", "adapter", "--large", f"acme/tiny@{stage.second}")
    assert answer.code == 6
    assert "FAIL base" in answer.out
    answer = stage("merge", "adapter", "--base", "acme/tiny", "-o", "wrong")
    assert answer.code == 6
    assert not (made / "wrong").exists()


def test_a_branch_is_recorded_as_its_commit(stage: Stage) -> None:
    answer = stage("prune", "acme/tiny", "--revision", "main", "-o", "from-main", *CUT)
    assert answer.code == 0, answer.err
    assert base_of(stage.folder / "from-main").revision == stage.second


def test_what_was_fetched_needs_no_hub(stage: Stage) -> None:
    assert stage("prune", f"acme/tiny@{stage.first}", "-o", "online", *CUT).code == 0
    stage.hub.fail("GET", "", DROP)
    stage.hub.fail("HEAD", "", DROP)
    answer = stage("prune", f"acme/tiny@{stage.first}", "-o", "offline", *CUT)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize(
    ("model", "failure", "sentence"),
    [
        ("acme/none", None, "has no acme/none"),
        ("acme/tiny@never", None, "acme/tiny@never has no such revision (404)"),
        ("acme/gated", None, "acme/gated is gated (403)"),
        ("acme/other", 429, "too many requests (429)"),
        ("acme/other", 503, "in trouble (503)"),
        ("acme/other", DROP, "cannot be reached to read acme/other"),
    ],
)
def test_failures(stage: Stage, model: str, failure: int | None, sentence: str) -> None:
    if "acme/gated" not in stage.hub.repositories:
        stage.hub.add("acme/gated", {"config.json": b"{}"}, gated=True)
    if failure is not None:
        stage.hub.fail("GET", "/api/models/acme/other", failure)
    answer = stage("plan", model, token=TOKEN)
    assert answer.code == 5, answer.err
    assert sentence in answer.err
    assert answer.err.count("error: ") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ("org/name", None)),
        ("org/name@main", ("org/name", "main")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("./org/name", (None, None)),
        ("name", (None, None)),
        ("a/b/c", (None, None)),
        ("org/name@", (None, None)),
    ],
)
def test_ids(text: str, expected: tuple[str | None, str | None]) -> None:
    assert split_id(text) == expected


def test_a_folder_goes_before_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name@main").mkdir(parents=True)
    assert resolve_model("org/name@main") == Path("org/name@main")
    assert split_id("org/name@main") == (None, None)


def test_contradictions() -> None:
    with pytest.raises(OptionError, match="names the revision v1 and --revision says v2"):
        resolve_model("org/name@v1", "v2")
    with pytest.raises(InputError, match="does not exist; give a model folder or a Hub id"):
        resolve_model("/nowhere/at/all")
