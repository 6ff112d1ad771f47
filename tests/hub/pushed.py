"""What is read off pushed files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from fake_hub import LFS, TOKEN


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
