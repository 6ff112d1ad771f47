"""Files that go along with a model or an adapter. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

CARRIED = ("tokenizer*", "chat_template*", "special_tokens_map.json", "vocab*", "merges.txt", "spiece.model")
ADAPTER_FILES = (*CARRIED, "generation_config.json")
MODEL_FILES = (*CARRIED, "added_tokens.json", "generation_config.json")
"""Files that go with a model; an adapter carries the tokenizer's alone (SGLang stumbles over added_tokens.json)."""


def copy_files(source: str | Path, target: str | Path, patterns: tuple[str, ...] = ADAPTER_FILES) -> None:
    """Copy the files of these patterns that a folder has."""
    for pattern in patterns:
        for file in sorted(Path(source).glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, Path(target) / file.name)
