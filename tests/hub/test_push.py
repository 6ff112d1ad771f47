"""push against a small Hub on loopback, with the real client, down to stock peft loading what was pushed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from fake_hub import DROP, LFS, TOKEN, FakeHub, Repository
from hub_client import Answer, Client, environment
from small_models import write_adapter
from transformers import AutoModelForCausalLM

import loram
from loram.artifact import read_json, read_manifest, write_json

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
ADAPTER = ("README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json", "loram.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
CARD = b"---\nlicense: apache-2.0\n---\n# Tiny\n"
ROWS = [
    {"prompt": "In the beginning", "completion": " God created the heaven"},
    {"prompt": "And", "completion": " God"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base, the data, and everything made of them up to the recovered adapter."""
    folder = tmp_path_factory.mktemp("secretplace")
    shutil.copytree(TINY, folder / "base")
    data = folder / "verses.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    cut = {"method": "random", "ratio": 0.5, "keep_first": 1, "keep_last": 1, "refit": False}
    loram.prune(folder / "base", out=folder / "small", base_id="acme/tiny", **cut)
    loram.train(folder / "small", data=data, out=folder / "trained", steps=2, lr=1e-2, log_every=1)
    loram.recover(folder / "trained", out=folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(server: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    process = Client(server.url, tmp_path_factory.mktemp("home"))
    yield process
    process.close()


@pytest.fixture
def hub(server: FakeHub) -> Iterator[FakeHub]:
    """The Hub with nothing on it but the base."""
    server.repositories.clear()
    server.requests.clear()
    server.tokens.clear()
    server.failures.clear()
    server.datasets.clear()
    server.objects.clear()
    files = {file.name: file.read_bytes() for file in TINY.iterdir() if file.is_file()}
    server.add("acme/tiny", files | {"README.md": CARD})
    yield server
    assert server.tokens <= {TOKEN}


@pytest.fixture
def push(client: Client, hub: FakeHub, place: Path) -> Callable[..., Answer]:
    def run(*words: str | Path, token: str | None = TOKEN) -> Answer:
        first, *rest = words or ("adapter",)
        return client("push", place / first, "--to", "me/adapter", *rest, token=token, folder=place)

    return run


def header(card: bytes | str) -> dict[str, Any]:
    text = card.decode() if isinstance(card, bytes) else card
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def clean(files: dict[str, bytes], place: Path) -> bool:
    """No places of this machine, no placeholders, no token in anything that people read."""
    text = b"\n".join(data for name, data in files.items() if not name.endswith(LFS)).decode()
    words = (
        "None](",
        "More Information",
        "/home",
        "/tmp",
        str(place),
        "secretplace",
        str(Path.home()),
        TOKEN,
        "Needed]",
    )
    assert [word for word in words if word in text] == []
    return True


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


def test_the_card(push: Callable[..., Answer], hub: FakeHub, place: Path) -> None:
    assert push().code == 0
    card = hub.files("me/adapter")["README.md"].decode()
    assert header(card) == {
        "base_model": "acme/tiny",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["lora", "loram", "peft", "transformers", "base_model:adapter:acme/tiny"],
    }
    for part in (
        'PeftModel.from_pretrained(base, "me/adapter")',
        "vllm serve acme/tiny --enable-lora --max-lora-rank 8 --lora-modules adapter=me/adapter",
        "method random, ratio 0.5; the first 1 and last 1 layers",
        "Training: 2 steps of 8 rows",
        "Data: verses.jsonl.",
        "Checked before upload: files, finite, base, modules and shapes, non-zero.",
        "No held-out evaluation came with this adapter.",
    ):
        assert part in card
    assert "\n\n\n" not in card


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


def test_a_path_is_no_id(push: Callable[..., Answer], hub: FakeHub, place: Path) -> None:
    own = shutil.copytree(place / "adapter", place / "own")
    manifest = read_manifest(own)
    assert manifest is not None
    assert manifest.base is not None
    nameless = replace(manifest, base=replace(manifest.base, id=str(place / "base")), parents=())
    write_json(own / "loram.json", nameless.to_json())
    answer = push("own")
    assert answer.code == 2
    assert "add --base-id org/name" in answer.err
    typed = replace(manifest, base=replace(manifest.base, id="secretplace/base", location="../secretplace/base"))
    write_json(own / "loram.json", replace(typed, parents=()).to_json())
    assert push("own", "--large", "base").code == 2, "a folder as it was typed looks like an id"
    assert push("own", "--base-id", "acme/tiny", "--large", "base").code == 0
    files = hub.files("me/adapter")
    assert header(files["README.md"])["base_model"] == "acme/tiny"
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "acme/tiny"
    assert clean(files, place)
    shutil.rmtree(own)


@pytest.mark.parametrize(
    ("card", "words", "expected"),
    [
        (CARD, ("--license", "mit"), {"license": "apache-2.0"}),
        (b"# no header", ("--license", "mit"), {"license": "mit"}),
        (b"# no header", (), {}),
        (
            b"---\nlicense: other\nlicense_name: acme-1\nlicense_link: https://acme.test\n---\n",
            (),
            {"license": "other", "license_name": "acme-1", "license_link": "https://acme.test"},
        ),
    ],
)
def test_the_license_is_never_guessed(
    card: bytes, words: tuple[str, ...], expected: dict[str, str], push: Callable[..., Answer], hub: FakeHub
) -> None:
    hub.add("acme/tiny", {"README.md": card})
    answer = push("adapter", *words)
    assert answer.code == 0, answer.err
    text = hub.files("me/adapter")["README.md"].decode()
    found = {key: value for key, value in header(text).items() if key.startswith("license")}
    assert found == expected
    assert ("No license is given here" in text) == (not expected)
    assert ("the card names none; add --license ID" in answer.err) == (not expected)


def test_a_base_that_the_hub_does_not_show(push: Callable[..., Answer], hub: FakeHub) -> None:
    hub.repositories.pop("acme/tiny")
    answer = push()
    assert answer.code == 0
    assert "does not show acme/tiny" in answer.err


def test_a_license_that_the_hub_does_not_know(push: Callable[..., Answer], hub: FakeHub) -> None:
    hub.add("acme/tiny", {"README.md": b"# no header"})
    answer = push("adapter", "--license", "whatever")
    assert answer.code == 5
    assert "refuses the card" in answer.err
    assert "must be one of" in answer.err
    assert "me/adapter" not in hub.repositories


def test_data_sets_of_the_hub_are_named(push: Callable[..., Answer], hub: FakeHub, place: Path) -> None:
    copy = shutil.copytree(place / "adapter", place / "with-data")
    manifest = read_manifest(copy)
    assert manifest is not None
    data = ["org/known", "org/unknown", "/secretplace/private.jsonl"]
    trained = replace(manifest, stage="train", options={**train_options(place), "data": data}, parents=())
    write_json(copy / "loram.json", trained.to_json())
    hub.datasets.add("org/known")
    assert push("with-data").code == 0
    text = hub.files("me/adapter")["README.md"].decode()
    assert header(text)["datasets"] == ["org/known"]
    assert "Data: org/known, org/unknown, private.jsonl." in text
    assert clean(hub.files("me/adapter"), place)
    shutil.rmtree(copy)


def train_options(place: Path) -> dict[str, Any]:
    manifest = read_manifest(place / "trained")
    assert manifest is not None
    return manifest.options


def test_the_ladder(push: Callable[..., Answer], hub: FakeHub, place: Path) -> None:
    rows = [
        {"name": "base", "loss": 3.5, "stderr": 0.01, "accuracy": 0.125},
        {"name": "large + recovered", "loss": 3.25, "stderr": 0.02, "accuracy": None},
    ]
    write_json(place / "elsewhere.json", {"rows": rows})
    write_json(place / "ladder.json", {"rows": rows[:1]})
    assert push("adapter", "--ladder", place / "elsewhere.json").code == 0
    text = hub.files("me/adapter")["README.md"].decode()
    table = (
        "| model | loss | ± standard error | exact match |\n|---|---|---|---|\n| base | 3.5000 | 0.0100 | 12.5 % |\n"
    )
    assert table + "| large + recovered | 3.2500 | 0.0200 |  |\n" in text
    assert "The recovered adapter helps the large model: 0.250 nats a token less loss." in text
    assert push("adapter", "--yes").code == 0
    assert "No held-out" in hub.files("me/adapter")["README.md"].decode(), "a ladder outside a run is nobody's"
    write_json(place / "run.json", {"stages": []})
    assert push("adapter", "--yes").code == 0
    assert "| base | 3.5000 |" in hub.files("me/adapter")["README.md"].decode()
    write_json(place / "elsewhere.json", {"rows": [{"name": "base"}]})
    assert push("adapter", "--yes", "--ladder", place / "elsewhere.json").code == 4
    for name in ("elsewhere.json", "ladder.json", "run.json"):
        (place / name).unlink()


def test_only_files_that_belong_there(push: Callable[..., Answer], hub: FakeHub, place: Path) -> None:
    copy = shutil.copytree(place / "adapter", place / "messy")
    for name in ("training_args.bin", "optimizer.pt", "loram.log", "metrics.jsonl", "added_tokens.json", "notes.txt"):
        (copy / name).write_text("x")
    (copy / "checkpoint-2").mkdir()
    (copy / "checkpoint-2" / "adapter_model.safetensors").write_text("x")
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = read_json(copy / "tokenizer_config.json") | {"name_or_path": str(place), "vocab_file": "/secretplace/v"}
    write_json(copy / "tokenizer_config.json", tokenizer)
    manifest = read_manifest(copy)
    assert manifest is not None
    write_json(copy / "loram.json", replace(manifest, files={}).to_json())
    assert push("messy").code == 0
    assert set(hub.files("me/adapter")) == {*ADAPTER, *TOKENIZER, "chat_template.jinja", ".gitattributes"}
    assert clean(hub.files("me/adapter"), place)
    shutil.rmtree(copy)


def test_an_adapter_that_peft_wrote(push: Callable[..., Answer], hub: FakeHub, place: Path) -> None:
    write_adapter(place / "base", place / "plain", ["q_proj", "v_proj"])
    assert push("plain").code == 2, "peft names the base by its path"
    answer = push("plain", "--base-id", "acme/tiny", "--large", "base")
    assert answer.code == 0, answer.err
    files = hub.files("me/adapter")
    assert "loram.json" not in files
    assert clean(files, place)
    assert "pruned copy" not in files["README.md"].decode()
    shutil.rmtree(place / "plain")


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
