"""An adapter's names when layers have other numbers: its modules, and what its config says by layer number."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from loram.adapter import Adapter, pattern_value


def renumbered(adapter: Adapter, rename: Callable[[str], str | None]) -> Adapter:
    """The adapter with every module renamed; those that `rename` gives no name are left out.

    Leaf names stay the targets, with the layers spelled out, where these say the same; else modules are named in full.
    """
    names = {module: new for module in adapter.pairs if (new := rename(module)) is not None}
    config = adapter.config | targets(adapter.config, list(names.values())) | patterns(adapter, names)
    return replace(adapter, pairs={new: adapter.pairs[old] for old, new in names.items()}, config=config)


def targets(config: dict[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """target_modules and its companions for these modules."""
    layers = {layer_of(module) for module in modules}
    named, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    plain = isinstance(named, (list, tuple)) and isinstance(excluded, (list, tuple)) and None not in layers
    if plain and not any(numbered(name) for name in (*(named or ()), *excluded)):
        return {"layers_to_transform": sorted(layer for layer in layers if layer is not None)}
    return {
        "target_modules": sorted(modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def patterns(adapter: Adapter, names: dict[str, str]) -> dict[str, Any]:
    """rank_pattern and alpha_pattern: as they are where they name no layer, else one entry for each module."""
    found: dict[str, Any] = {}
    for key, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        old, usual = adapter.config.get(key) or {}, adapter.config[default]
        if any(numbered(name) for name in old):
            values = {re.escape(new): pattern_value(old, module, usual) for module, new in names.items()}
            found[key] = {name: value for name, value in values.items() if value != usual}
    return found


def layer_of(module: str) -> int | None:
    """The layer number in a module's name."""
    match = re.search(r"\.(\d+)\.", module)
    return int(match[1]) if match else None


def numbered(name: str) -> bool:
    """Whether a name or a pattern may speak of layer numbers."""
    return any(character.isdigit() for character in name)
