"""push as the last section of a run: shown unless the recipe says yes, refused early, never half of anything."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import DROP, TOKEN, FakeHub
from hub_client import Answer, Client, environment

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
RECIPE = """
prune: {method: random, ratio: 0.5, keep_first: 1, keep_last: 1, base_id: acme/tiny}
train: {steps: 2, batch: 2, max_length: 48, lr: 1e-3, save_every: 1}
recover: {}
verify: {}
eval: {compare: true, max_length: 48}
push: {to: me/tuned}
"""


class Stage:
    """A Hub, a client, and a folder with the recipe, the model and its data."""

    def __init__(self, hub: FakeHub, client: Client, folder: Path) -> None:
        self.hub, self.client, self.folder = hub, client, folder
        shutil.copytree(TINY, folder / "base")
        (folder / "recipe.yaml").write_text(RECIPE)
        rows = [{"prompt": f"And the number {n} ", "completion": f"was {n + 1}."} for n in range(20)]
        (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        files = {file.name: file.read_bytes() for file in TINY.iterdir() if file.is_file()}
        hub.add("acme/tiny", files | {"README.md": b"---\nlicense: apache-2.0\n---\n"})

    def words(self, *more: str, out: str = "run") -> list[str]:
        data = ("--model", "base", "--data", "rows.jsonl", "--eval-data", "rows.jsonl")
        return ["run", "recipe.yaml", *data, "-o", out, *more]

    def __call__(self, *more: str, out: str = "run", token: str | None = TOKEN) -> Answer:
        self.hub.requests.clear()
        return self.client(*self.words(*more, out=out), token=token, folder=self.folder)


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
    stage.hub.repositories.pop("me/tuned", None)


def test_a_push_is_shown_and_made_when_the_recipe_says_yes(stage: Stage) -> None:
    shown = stage()
    assert shown.code == 0, shown.err
    assert not stage.hub.writes()
    assert "nothing was uploaded (--dry-run)" in shown.out + shown.err
    assert "next: loram push run/adapter --to me/tuned --large " in shown.out
    done = stage("--set", "push.yes=true")
    assert done.code == 0, done.err
    files = stage.hub.files("me/tuned")
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "loram.json"} <= set(files)
    assert stage.hub.repositories["me/tuned"].private
    assert "large + recovered" in files["README.md"].decode()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "acme/tiny"
    again = stage("--set", "push.yes=true", "--json")
    assert {item["name"] for item in again.json["stages"] if item.get("skipped")} >= {"train", "recover", "push"}
    assert not stage.hub.writes()


@pytest.mark.parametrize(
    ("more", "token", "code", "sentence"),
    [
        (("push.to=nowhere",), TOKEN, 2, "push: to is 'nowhere'; expected a repository on the Hub"),
        (("prune.base_id=null",), TOKEN, 2, "push: the large model is 'base', which others do not have; add base_id"),
        (("push.yes=true",), "hf_" + "w" * 34, 5, "write to me/tuned"),
        (("push.yes=true", "push.to=me/open"), TOKEN, 2, "me/open is public"),
        (("push.yes=true", "push.pr=true"), TOKEN, 5, "no me/tuned that a pull request could go to"),
    ],
)
def test_what_would_be_refused_at_the_end_is_refused_at_the_beginning(
    stage: Stage, more: tuple[str, ...], token: str, code: int, sentence: str
) -> None:
    stage.hub.add("me/open", {"README.md": b""})
    settings = [word for text in more for word in ("--set", text)]
    answer = stage(*settings, out="never", token=token)
    assert answer.code == code, answer.err
    assert sentence in answer.err
    assert not (stage.folder / "never").exists()
    assert not stage.hub.writes()


def test_push_stands_last(stage: Stage) -> None:
    answer = stage("--stages", "prune,train,recover,push,verify", out="never")
    assert answer.code == 2
    assert "push stands before verify; put it last" in answer.err


def test_a_push_that_failed_is_made_by_the_same_line_again(stage: Stage) -> None:
    stage.hub.fail("POST", "/api/repos/create", DROP)
    failed = stage("--set", "push.yes=true", out="again")
    assert failed.code == 5, failed.err
    assert "me/tuned" not in stage.hub.repositories
    stage.hub.failures.clear()
    done = stage("--set", "push.yes=true", "--json", out="again")
    assert done.code == 0, done.err
    assert {item["name"] for item in done.json["stages"] if not item.get("skipped")} == {"push"}
    assert "adapter_model.safetensors" in stage.hub.files("me/tuned")


def test_a_half_trained_adapter_is_never_pushed(stage: Stage, tmp_path: Path) -> None:
    """SIGTERM in the training of a run that would push: 75, and the Hub is as it was."""
    stage.hub.requests.clear()
    words = stage.words("--set", "push.yes=true", "--set", "train.steps=100000", out="stopped")
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "loram", *words],
        cwd=stage.folder,
        env=environment(stage.hub.url, tmp_path, HF_TOKEN=TOKEN) | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoints = stage.folder / "stopped" / "train.partial" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*")) and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, told = child.communicate(timeout=60)
    assert child.returncode == 75, told
    assert "loram run recipe.yaml" in told
    assert not stage.hub.writes()
    assert not (stage.folder / "stopped" / "adapter").exists()
