"""What a manifest records of `recover --calibrate`, read back: the adapter must be the small one's times the scales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loram.adapter import Adapter
from loram.errors import InputError, MismatchError
from loram.families import FAMILIES
from loram.group_scales import NAMES, Groups
from loram.pruning_map import PruningMap
from loram.stages.recover import recover_adapter

SLACK = 1e-3
"""Relative: what rounding B to 16 bits does to the norm of a group is far less."""


def recorded_groups(record: Mapping[str, Any], where: str | Path) -> tuple[Groups, dict[str, float], dict[str, float]]:
    """The groups, their scales and the norms that their updates had before; InputError for a record that is none."""
    try:
        family = next(family for family in FAMILIES.values() if family.name == record["family"])
        scales, norms = ({str(k): float(v) for k, v in record[key].items()} for key in ("scales", "norms"))
        groups = Groups(family, int(record["layers"]))
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise InputError(
            f"{where}/loram.json: the record of --calibrate is damaged ({error!r}); recover again"
        ) from None
    if set(scales) != set(norms) or not set(scales) <= set(NAMES) or not all(map(math.isfinite, scales.values())):
        raise InputError(f"{where}/loram.json: the record of --calibrate is damaged: its scales are {scales}")
    return groups, scales, norms


def rescaled(narrow: Adapter, record: Mapping[str, Any] | None, small: PruningMap, where: str | Path) -> Adapter:
    """A small adapter with the scales that its recovered one was given."""
    if record is None:
        return narrow
    groups, scales, _ = recorded_groups(record, where)
    return groups.scaled(narrow, scales, small.numbering.to_large)


def check_scales(
    record: Mapping[str, Any], adapter: Adapter, narrow: Adapter | None, small: PruningMap | None, where: str | Path
) -> str:
    """Each group's updates against the recorded norm times the scale, and against the small adapter's if it is there.

    MismatchError where they are other than recorded.
    """
    groups, scales, norms = recorded_groups(record, where)
    found = groups.norms(adapter)
    for name, before in norms.items():
        expected = scales[name] * before
        if not math.isclose(found.get(name, 0.0), expected, rel_tol=SLACK, abs_tol=1e-9 * before):
            raise MismatchError(
                f"{name} has the norm {found.get(name, 0.0):.6g}, but {before:.6g} × the recorded scale "
                f"{scales[name]:g} is {expected:.6g}: the scale or the adapter was changed"
            )
    told = ", ".join(f"{name} {scale:g}" for name, scale in scales.items())
    if narrow is None or small is None:
        return told
    expected_adapter = groups.scaled(recover_adapter(narrow, small, where), scales)
    for module, pair in expected_adapter.pairs.items():
        stored = adapter.pairs[module]
        wanted = pair.scale * pair.b.double()
        found_b = stored.scale * stored.b.double()[:, : pair.rank]
        if not bool((found_b - wanted).norm() <= 4 * torch.finfo(stored.b.dtype).eps * wanted.norm()):
            raise MismatchError(f"{module} is not the small adapter's update times its group's scale of the record")
    return f"{told}; as the small adapter's updates times these"
