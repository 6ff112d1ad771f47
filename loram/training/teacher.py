"""The large model's logits in a folder: the k largest of every token, written once, a layer in memory at a time.

`teacher.json` says whose logits these are: which weights, which windows, which temperature. The windows are dealt to
parts; a part is a folder with a file of checksums written last, so that one that was cut off does not count and a
writer that was stopped goes on with the next. Small and large model are never in memory together.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from loram.artifact import read_json, write_json
from loram.blockwise import BlockRunner
from loram.errors import OptionError
from loram.shards import write_tensors
from loram.training.checkpoints import damage, seal
from loram.training.cross_entropy import capped, chunk_rows, soft_cap
from loram.training.divergence import TopK, against_top_k, top_k
from loram.training.objectives import Lesson, Teacher

logger = logging.getLogger(__name__)
IDENTITY, LOGITS = "teacher.json", "logits.safetensors"
PART = 256
"""Windows that go through the large model together: each part reads all its weights once."""


def open_cache(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder this teacher's; OptionError where it is another's, or not a cache at all."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / IDENTITY).is_file():
        raise OptionError(f"--teacher-cache {folder} holds other things than logits; give a new folder")
    if (folder / IDENTITY).is_file():
        before = read_json(folder / IDENTITY)
        other = sorted(key for key in {*before, *identity} if before.get(key) != identity.get(key))
        if other:
            raise OptionError(
                f"--teacher-cache {folder} holds logits that differ in {', '.join(other)}; "
                "give what it was written with, or a new folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / IDENTITY, dict(identity))


def part_folder(folder: Path, number: int) -> Path:
    """Where a part lies."""
    return folder / f"part-{number:05}"


def missing_parts(folder: Path, count: int) -> list[int]:
    """The parts of `count` windows that are not there, or damaged, which is said."""
    missing = []
    for number in range(-(-count // PART)):
        part = part_folder(folder, number)
        reason = damage(part) if part.is_dir() else "not written"
        if reason is not None:
            missing.append(number)
            if part.is_dir():
                logger.warning("%s is damaged (%s) and is written again", part, reason)
    return missing


def write_part(folder: Path, number: int, tensors: Mapping[str, Tensor]) -> None:
    """Write a part, sealed last."""
    part = part_folder(folder, number)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write_tensors(part / LOGITS, tensors)
    seal(part)


@torch.no_grad()
def taught(
    runner: BlockRunner, windows: Tensor, count: int, temperature: float, after_block: Callable[[], None]
) -> dict[str, Tensor]:
    """What the large model says about windows (N, T), at most `count` logits of each token.

    `tokens` (N, T, k) int32, `logs` (N, T, k) and `rest` (N, T) fp32 as in `TopK`, and `hidden` (N, T, width), the
    states that the head reads, in the runner's dtype. `after_block` is called after every layer.
    """
    hidden = runner.embed(windows)
    for block in runner.blocks(hidden):
        block.run()
        after_block()
    found: dict[str, list[Tensor]] = {"tokens": [], "logs": [], "rest": [], "hidden": []}
    with runner.head() as model:
        head, cap = model.get_output_embeddings(), soft_cap(model)
        for start in range(0, len(hidden), runner.rows):
            states = model.get_decoder().norm(hidden.read(slice(start, start + runner.rows)).to(runner.device))
            found["hidden"].append(states.cpu())
            for piece in states.reshape(-1, states.shape[-1]).split(chunk_rows(int(model.config.vocab_size))):
                best = top_k(capped(head(piece).float(), cap) / temperature, count)
                for key in ("tokens", "logs", "rest"):
                    found[key].append(getattr(best, key).cpu())
    hidden.close()
    rows, length = windows.shape
    joined = {key: torch.cat(values) for key, values in found.items()}
    return {
        "tokens": joined["tokens"].reshape(rows, length, -1),
        "logs": joined["logs"].reshape(rows, length, -1),
        "rest": joined["rest"].reshape(rows, length),
        "hidden": joined["hidden"],
    }


def cached_teacher(folder: Path, device: torch.device, *, hidden: bool) -> Teacher:
    """What the folder says about windows; rows are read as they are asked for."""
    files: dict[int, Any] = {}

    def row(number: int, key: str) -> Tensor:
        part, place = divmod(number, PART)
        if part not in files:
            files[part] = safe_open(str(part_folder(folder, part) / LOGITS), "pt")
        found: Tensor = files[part].get_slice(key)[place]
        return found

    def rows(numbers: Sequence[int], key: str) -> Tensor:
        return torch.cat([row(number, key) for number in numbers]).to(device)

    def teach(numbers: Sequence[int]) -> Lesson:
        said = TopK(rows(numbers, "tokens"), rows(numbers, "logs"), rows(numbers, "rest"))
        return Lesson(against_top_k(said), rows(numbers, "hidden") if hidden else None)

    return teach
