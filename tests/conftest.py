"""What all tests share: one thread, no network, and tiny stock models with random weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny stock model, by its name in stock_models.VARIANTS; built once, never to be written to."""
    from stock_models import build

    built: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in built:
            built[name] = build(name, tmp_path_factory.mktemp("stock") / name)
        return built[name]

    return folder
