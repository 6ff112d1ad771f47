"""How a stopped calibration goes on: what prune finds at a block lies sealed in OUT.partial until OUT is there."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from loram.artifact import SEAL, Base, Manifest, read_manifest, sha256_json
from loram.device import native_bf16, pick_device
from loram.errors import OptionError
from loram.options import PruneOptions
from loram.sealing import Steps, checkpoints_of, discard, keep_only_steps, whose
from loram.stages.pruned import stopped
from loram.training.checkpoints import differences, identity
from loram.training.signals import StopRequest

logger = logging.getLogger(__name__)
COMPUTED = "computed"


def identity_of(options: PruneOptions, windows: Tensor, base: Base) -> dict[str, Any]:
    """What makes a continuation the same calibration: options, text, model, and what it is computed with."""
    model = base.config_sha256 + base.weights_fingerprint
    computed = f"{pick_device().type}{', bf16' if native_bf16() else ''}"
    found = identity(options, sha256_json(windows.tolist()), model) | {COMPUTED: computed}
    body: dict[str, Any] = json.loads(json.dumps(found))
    return body


def open_steps(options: PruneOptions, now: dict[str, Any], stop: StopRequest) -> Steps:
    """The blocks that are done of this very calibration; OptionError where those there are of another one."""
    out = Path(options.out)
    if options.resume == "never":
        discard(out)
    place = checkpoints_of(out)
    done = layers_done(place)
    other = differing(place, now)
    if other and done:
        raise OptionError(
            f"{place} holds a calibration of {done} layers that is not this one: {'; '.join(other)}; "
            "give what it was started with to go on, or --resume never to start anew"
        )
    if not other and (found := saved(place)):
        logger.info("going on behind %s (%s)", found, place)
    keep_only_steps(place.parent)
    return Steps(place, now, lambda: stopped(options, stop, partial(saved, place)))


def differing(place: Path, now: dict[str, Any]) -> list[str]:
    """In words, what differs between the calibration in a folder and this one."""
    before = whose(place)
    if not isinstance(before, dict):
        return []
    found = differences(before, now, "calibration text")
    if before.get(COMPUTED) != now[COMPUTED]:
        found.append(f"it was computed on {before.get('computed')} and would go on on {now['computed']}")
    return found


def layers_done(place: Path) -> int:
    """How many blocks are done and sealed."""
    return len(sealed(place, "block-"))


def sealed(place: Path, kind: str) -> list[int]:
    """The numbers of the steps of a kind that are whole: sealed, and no longer on the way to their place."""
    numbers = (seal.parent.name.removeprefix(kind) for seal in place.glob(f"{kind}*/{SEAL}"))
    return [int(number) for number in numbers if number.isdigit()]


def saved(place: Path) -> str:
    """In words, which layers are sealed: those that are done, or else those Taylor went through on the way there."""
    if done := layers_done(place):
        return f"{done} layers that are done"
    passed = sealed(place, "input-")
    return f"{max(passed)} layers of the way there" if passed else ""


def earlier_result(options: PruneOptions) -> Manifest | None:
    """The manifest of a calibrated small model that stands in OUT and may be what is asked for."""
    if options.force or options.resume != "auto" or not Path(options.out).is_dir():
        return None
    manifest = read_manifest(options.out)
    found = manifest is not None and manifest.stage == "prune" and manifest.training is not None
    return manifest if found else None


def is_same_work(earlier: Manifest | None, now: dict[str, Any]) -> bool:
    """Whether what stands in OUT was calibrated like this."""
    return earlier is not None and bool(now) and not differences(earlier.training or {}, now)


def recorded(now: dict[str, Any]) -> dict[str, Any] | None:
    """What a manifest says of the calibration: the same wherever it was computed."""
    return {key: value for key, value in now.items() if key != COMPUTED} or None
