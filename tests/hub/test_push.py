"""push against a small Hub on loopback, with the real client, down to stock peft loading what was pushed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fake_hub import DROP, TOKEN, FakeHub, Repository
from hub_client import Answer, environment
from pushed import clean, header
from transformers import AutoModelForCausalLM

import loram
from loram.artifact import read_manifest, write_json

ADAPTER = ("README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json", "loram.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
ERRORS = [
    ("GET", "/api/whoami-v2", 401, "did not accept the token"),
    ("GET", "/api/whoami-v2", 429, "too many requests"),
    ("GET", "/api/whoami-v2", 503, "in trouble"),
    ("GET", "/api/whoami-v2", DROP, "cannot be reached"),
    ("GET", "/api/models/me/adapter", 403, "may not read me/adapter"),
    ("GET", "/api/models/acme/tiny", DROP, "cannot be reached to read acme/tiny"),
    ("POST", "/api/repos/create", 401, "did not accept the token"),
    ("POST", "/api/repos/create", 403, "with write permission"),
    ("POST", "/api/repos/create", 404, "has no me/adapter"),
    ("POST", "/api/repos/create", 409, "by somebody else at the same time"),
    ("POST", "/api/repos/create", 429, "too many requests"),
    ("POST", "/api/repos/create", DROP, "cannot be reached to create me/adapter"),
    ("POST", "/preupload/", 403, "may not write to me/adapter"),
    ("POST", "/lfs/objects/batch", 404, "has no me/adapter"),
    ("PUT", "/lfs/", 403, "may not write to me/adapter"),
    ("POST", "/commit/", 409, "by somebody else at the same time"),
    ("POST", "/commit/", 412, "by somebody else at the same time"),
    ("POST", "/commit/", 429, "too many requests"),
    ("POST", "/commit/", 500, "in trouble"),
    ("POST", "/commit/", DROP, "cannot be reached to write to me/adapter"),
]


def test_a_new_private_repository(push: Callable[..., Answer], hub: FakeHub, place: Path) -> None:
    answer = push("adapter", "--json")
    assert answer.code == 0, answer.err
    files = hub.files("me/adapter")
    assert set(files) == {*ADAPTER, *TOKENIZER, ".gitattributes"}
    assert answer.json["url"] == f"{hub.url}/me/adapter"
    assert answer.json["files"] == {name: len(data) for name, data in files.items() if name != ".gitattributes"}
    assert (answer.json["visibility"], answer.json["pushed"]) == ("private", True)
    assert hub.repositories["me/adapter"].private
    assert len(hub.repositories["me/adapter"].commits) == 2, "one commit beside the Hub's own first one"
    assert files["adapter_model.safetensors"] == (place / "adapter" / "adapter_model.safetensors").read_bytes()
    assert clean(files, place)
    assert hub.tokens == {TOKEN}
    assert hub.requests[0] == ("GET", "/api/whoami-v2")
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "acme/tiny"


def test_what_is_pushed_is_a_verifiable_artifact(push: Callable[..., Answer], hub: FakeHub, place: Path) -> None:
    assert push().code == 0
    folder = place / "downloaded"
    folder.mkdir()
    for name, data in hub.files("me/adapter").items():
        (folder / name).write_bytes(data)
    result: Any = loram.verify(folder, large=place / "base")
    assert result.ok, result.summary()
    assert {check.name for check in result.checks} >= {"files", "base"}
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.base is not None
    assert manifest.base.location == ""
    assert {parent.location for parent in manifest.parents} == {""}
    before = read_manifest(place / "adapter")
    assert before is not None
    assert before.base is not None
    assert manifest.base.weights_fingerprint == before.base.weights_fingerprint
    assert not {"adapter", "out", "small"} & manifest.options.keys()
    shutil.rmtree(folder)


def test_dry_run_sends_nothing(push: Callable[..., Answer], hub: FakeHub, place: Path) -> None:
    answer = push("adapter", "--dry-run")
    assert answer.code == 0
    assert hub.writes() == []
    assert "me/adapter" not in hub.repositories
    for part in ("README.md", "adapter_model.safetensors", "a new repository, private", "base_model: acme/tiny"):
        assert part in answer.out
    assert answer.out.splitlines()[-1].strip().endswith("--to me/adapter")
    body = push("adapter", "--dry-run", "--json").json
    assert (body["pushed"], body["state"]) == (False, "a new repository")
    assert header(body["card"])["license"] == "apache-2.0"
    assert set(body["files"]) == {*ADAPTER, *TOKENIZER}


def test_dry_run_does_without_the_hub(push: Callable[..., Answer], hub: FakeHub) -> None:
    hub.fail("GET", "/api/whoami-v2", DROP)
    answer = push("adapter", "--dry-run", "--license", "mit")
    assert answer.code == 0
    assert "the Hub cannot be reached" in answer.err
    assert "the Hub could not be asked, private" in answer.out
    assert "license: mit" in answer.out


def test_public_is_only_what_was_asked_to_be(push: Callable[..., Answer], hub: FakeHub) -> None:
    refused = push("adapter", "--public")
    assert refused.code == 2
    assert "add --yes" in refused.err
    assert "me/adapter" not in hub.repositories
    assert push("adapter", "--public", "--yes").code == 0
    assert not hub.repositories["me/adapter"].private
    commits = len(hub.repositories["me/adapter"].commits)
    answer = push("adapter", "--yes")
    assert answer.code == 2
    assert "is public" in answer.err
    assert "add --public" in answer.err
    assert len(hub.repositories["me/adapter"].commits) == commits


def test_a_private_repository_is_opened_last(push: Callable[..., Answer], hub: FakeHub) -> None:
    assert push().code == 0
    hub.requests.clear()
    assert push("adapter", "--public", "--yes", "--license", "mit").code == 0
    assert not hub.repositories["me/adapter"].private
    assert hub.writes()[-1] == ("PUT", "/api/models/me/adapter/settings")


def test_an_update_needs_a_yes(push: Callable[..., Answer], hub: FakeHub) -> None:
    hub.add("me/adapter", {".gitattributes": b""}, private=True)
    assert push().code == 0, "an empty one, as an interrupted push leaves it, does not"
    answer = push()
    assert answer.code == 2
    assert "an update, private, and nobody can be asked; add --yes" in answer.err
    assert push("adapter", "--yes").code == 0


def test_pull_request(push: Callable[..., Answer], hub: FakeHub) -> None:
    hub.add("me/adapter", {"README.md": b"old"}, private=True)
    answer = push("adapter", "--pr", "--yes", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["url"] == f"{hub.url}/me/adapter/discussions/1"
    assert hub.files("me/adapter") == {"README.md": b"old"}
    assert set(hub.files("me/adapter", "refs/pr/1")) == {*ADAPTER, *TOKENIZER}
    assert hub.repositories["me/adapter"].private
    hub.repositories.pop("me/adapter")
    missing = push("adapter", "--pr", "--yes")
    assert missing.code == 5
    assert "404" in missing.err
    assert "me/adapter" not in hub.repositories


@pytest.mark.parametrize(("method", "path", "status", "sentence"), ERRORS)
def test_failures_are_one_sentence(
    method: str, path: str, status: int, sentence: str, push: Callable[..., Answer], hub: FakeHub
) -> None:
    hub.fail(method, path, status)
    answer = push("adapter", "-q")
    assert answer.code == 5, answer.err
    errors = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert status == DROP or str(status) in errors[0]
    assert "Traceback" not in answer.err
    held = hub.repositories.get("me/adapter", Repository())
    assert all(set(tree) == {".gitattributes"} for tree in held.commits.values()), "half of a push is visible"
    assert TOKEN not in push("adapter", "-v").err, "not in a traceback either"


def test_a_gated_target(push: Callable[..., Answer], hub: FakeHub) -> None:
    hub.fail("GET", "/api/models/me/adapter", 403, X_Error_Code="GatedRepo")
    answer = push()
    assert answer.code == 5
    assert "me/adapter is gated (403)" in answer.err


def test_a_wrong_token_costs_nothing(push: Callable[..., Answer], hub: FakeHub) -> None:
    answer = push("adapter", token=None)
    assert answer.code == 5
    assert "no Hub token was found" in answer.err
    assert hub.requests == []


def test_offline(hub: FakeHub, place: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from loram_cli.app import main\n"
        "code = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules, 'found out before anything heavy'\n"
        "raise SystemExit(code)"
    )
    line = [sys.executable, "-c", code, "push", str(place / "adapter"), "--to", "me/adapter"]
    variables = environment(hub.url, tmp_path, HF_HUB_OFFLINE="1", HF_TOKEN=TOKEN)
    done = subprocess.run(line, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert hub.requests == []


def test_what_fails_verify_is_not_pushed(push: Callable[..., Answer], hub: FakeHub, place: Path) -> None:
    broken = shutil.copytree(place / "adapter", place / "broken")
    data = bytearray((broken / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (broken / "adapter_model.safetensors").write_bytes(data)
    answer = push("broken")
    assert answer.code == 6
    assert "fails verify and was not pushed: files" in answer.err
    assert hub.writes() == []
    shutil.rmtree(broken)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("trained",), "run `loram recover"),
        (("small",), "is a small-model"),
        (("adapter", "--base-id", "nowhere"), "expected the large model's id"),
        (("adapter", "--to", "adapter"), "such as user/name"),
    ],
)
def test_refusals(words: tuple[str, ...], sentence: str, push: Callable[..., Answer], hub: FakeHub) -> None:
    answer = push(*words)
    assert answer.code == 2
    assert sentence in answer.err
    assert hub.writes() == []


def test_nothing_is_sent_twice(push: Callable[..., Answer], hub: FakeHub) -> None:
    hub.fail("POST", "/commit/", 500)
    assert push().code == 5
    assert [method for method, _ in hub.requests].count("PUT") == 1
    hub.failures.clear()
    assert push().code == 0, "also without --yes: the repository is empty still"
    assert [method for method, _ in hub.requests].count("PUT") == 1


def test_a_merged_model_in_shards(push: Callable[..., Answer], hub: FakeHub, place: Path, tmp_path: Path) -> None:
    merged = place / "merged"
    loram.merge(place / "adapter", base=place / "base", out=merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    manifest = read_manifest(merged)
    assert manifest is not None
    sharded = place / "sharded"
    shutil.copytree(tmp_path / "sharded", sharded)
    write_json(sharded / "loram.json", replace(manifest, files={}).to_json())
    answer = push("sharded", "--json")
    assert answer.code == 0, answer.err
    files = hub.files("me/adapter")
    shards = [name for name in files if name.startswith("model-0")]
    assert len(shards) > 1
    assert {"config.json", "model.safetensors.index.json", "loram.json", "README.md"} <= set(files)
    assert header(files["README.md"])["base_model_relation"] == "finetune"
    assert header(files["README.md"])["library_name"] == "transformers"
    assert clean(files, place)
    (sharded / shards[0]).unlink()
    assert push("sharded", "--yes").code == 6
    shutil.rmtree(sharded)
    shutil.rmtree(merged)


def test_peft_loads_what_was_pushed(push: Callable[..., Answer], hub: FakeHub, place: Path, tmp_path: Path) -> None:
    """The loader on the card, as it is, in a process that has no loram."""
    assert push().code == 0
    card = hub.files("me/adapter")["README.md"].decode()
    loader = card.split("```python\n")[1].split("```")[0]
    code = (
        f"{loader}\n"
        "import json, sys, torch\n"
        "assert not [name for name in sys.modules if name.partition('.')[0].startswith('loram')]\n"
        "tokens = torch.arange(2, 34).reshape(2, 16)\n"
        "with torch.no_grad():\n"
        "    logits = model(input_ids=tokens).logits.float()\n"
        "print(json.dumps([logits.flatten().tolist(), tokenizer('God')['input_ids']]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(hub.url, tmp_path, HF_TOKEN=TOKEN),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    logits, tokens = json.loads(done.stdout)
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype="auto")
    inputs = torch.arange(2, 34).reshape(2, 16)
    with torch.no_grad():
        plain = base(input_ids=inputs).logits.float().flatten()
        local = peft.PeftModel.from_pretrained(base, str(place / "adapter"))
        expected = local(input_ids=inputs).logits.float().flatten()
    assert torch.equal(torch.tensor(logits), expected)
    assert not torch.equal(plain, expected)
    assert tokens
