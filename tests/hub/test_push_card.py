"""What a pushed repository says of itself: the model card, names, licenses, and nothing of this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub
from hub_client import Answer
from pushed import clean, header
from small_models import write_adapter

from loram.artifact import read_json, read_manifest, write_json

ADAPTER = ("README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json", "loram.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
CARD = b"---\nlicense: apache-2.0\n---\n# Tiny\n"


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
