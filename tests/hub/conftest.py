"""A small Hub on loopback with the base on it, the real client, and an artifact of every kind to push."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub
from hub_client import Answer, Client

import loram

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
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
