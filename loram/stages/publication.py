"""What there is to say about an artifact that goes to the Hub: verified first, then traced back to how it was made."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loram.adapter import CONFIG
from loram.artifact import Base, Manifest, read_json, read_manifest, require_folder
from loram.checkpoint import Checkpoint
from loram.errors import InputError, KindError, LoramError, MismatchError, OptionError
from loram.evaluation.ladder import Ladder, Rung
from loram.hub.card import CardFacts
from loram.hub.contents import data_name
from loram.hub.download import is_hub_id, is_path, split_id
from loram.hub.upload import License
from loram.options import PushOptions, VerifyOptions
from loram.portability import Verdict
from loram.stages.verify import ancestors, check_files, verify
from loram.stages.wiring import final_adapter

logger = logging.getLogger(__name__)
RECORD, LADDER = "run.json", "ladder.json"
SERVED = "--max-lora-rank "


@dataclass(frozen=True, kw_only=True)
class Publication:
    """A verified adapter or merged model and what is known of it."""

    folder: Path
    kind: str
    manifest: Manifest | None
    base: Base
    lineage: tuple[Manifest, ...]
    checked: str
    adapter: dict[str, Any]
    vllm: Verdict
    ladder: Ladder | None
    steps: tuple[int | None, ...]

    @property
    def datasets(self) -> list[str]:
        """What the training data could be called on the Hub."""
        used = [source for made in self.lineage if made.stage == "train" for source in made.options.get("data", ())]
        return [name for name in dict.fromkeys(map(data_name, used)) if is_hub_id(name)]

    def facts(self, repo: str, license: License | None, datasets: tuple[str, ...]) -> CardFacts:
        """What the card says."""
        rank = self.vllm.note.removeprefix(SERVED).split()[0] if self.vllm.note.startswith(SERVED) else ""
        return CardFacts(
            repo=repo,
            kind=self.kind,
            base=self.base,
            license=license,
            datasets=datasets,
            lineage=self.lineage,
            adapter=self.adapter,
            steps=self.steps,
            checks=(self.checked,),
            vllm_rank=int(rank) if self.vllm.ok and rank.isdigit() else None,
            vllm_note=self.vllm.note,
            ladder=tuple(self.ladder.to_json()["rows"]) if self.ladder else (),
            verdict=self.ladder.verdict() if self.ladder else "",
        )


def gather(options: PushOptions) -> Publication:
    """Verify the folder and trace it back; MismatchError where it fails, KindError where it is of no use to others."""
    folder = require_folder(options.adapter)
    manifest = read_manifest(folder)
    kind = manifest.kind if manifest else "adapter"
    if kind == "small-adapter":
        raise KindError(
            f"{folder} is an adapter of a small model, which others lack; run `loram recover {folder} -o ADAPTER` first"
        )
    if kind not in ("adapter", "merged-model"):
        raise KindError(f"{folder} is a {kind}; `loram push` takes an adapter of a large model or a merged model")
    if kind == "adapter":
        checked, vllm = verified_adapter(options)
    else:
        assert manifest is not None
        checked, vllm = verified_model(folder, manifest), Verdict(True)
    places = list(ancestors(folder))
    made = [(place, found) for place in places if (found := read_manifest(place)) is not None]
    lineage = tuple(found for _, found in made)
    adapter: dict[str, Any] = next((read_json(place / CONFIG) for place in places if (place / CONFIG).is_file()), {})
    return Publication(
        folder=folder,
        kind=kind,
        manifest=manifest,
        base=base_of(options, manifest, adapter, lineage),
        lineage=lineage,
        checked=checked,
        adapter=adapter,
        vllm=vllm,
        ladder=ladder_of(options, folder),
        steps=tuple(steps_of(place) for place, found in made if found.stage == "train"),
    )


def verified_adapter(options: PushOptions) -> tuple[str, Verdict]:
    """What `verify` looked at, in a sentence, and whether vLLM serves it."""
    result = verify(VerifyOptions(adapter=options.adapter, large=options.large))
    failed = [check for check in result.checks if not check.ok]
    if failed:
        raise MismatchError(
            f"{options.adapter} fails verify and was not pushed: {failed[0].name}: {failed[0].detail}"
            + (f" (and {len(failed) - 1} more)" if failed[1:] else "")
        )
    if not result.portable["peft"].ok:
        raise KindError(f"{options.adapter} is not for others and was not pushed ({result.portable['peft'].note})")
    unchecked = [check.name for check in result.checks if check.detail.startswith("not checked")]
    if unchecked:
        logger.warning("%s was not checked against its large model; add --large FOLDER to be sure", options.adapter)
    looked = ", ".join(check.name for check in result.checks if check.name not in unchecked)
    rest = " Not checked against the base's weights." if unchecked else ""
    return f"Checked before upload: {looked}.{rest}", result.portable["vllm"]


def verified_model(folder: Path, manifest: Manifest) -> str:
    """A merged model's files as merge wrote them, its shards and index whole."""
    try:
        check_files(folder, manifest)
        with Checkpoint(folder) as checkpoint:
            count = len(checkpoint.entries)
    except LoramError as error:
        raise MismatchError(f"{folder} fails verify and was not pushed: {error}") from error
    return f"Checked before upload: every file against the digest written by merge, the headers of {count} tensors."


def base_of(
    options: PushOptions, manifest: Manifest | None, config: dict[str, Any], lineage: tuple[Manifest, ...]
) -> Base:
    """The large model with the id it has on the Hub; OptionError where only a path is known."""
    known = manifest.base if manifest else None
    if known is None:
        found, revision = split_id(str(config.get("base_model_name_or_path") or ""))
        known = Base(found or "", "", config.get("revision") or revision, "", "")
    given = options.base_id
    if given is not None:
        if not is_hub_id(given):
            raise OptionError(f"--base-id is {given!r}; expected the large model's id on the Hub, such as org/name")
        return replace(known, id=given, revision=known.revision if known.id in (given, "") else None)
    same = [made.base for made in lineage if made.base and made.base.weights_fingerprint == known.weights_fingerprint]
    for base in (known, *same):
        stated = any(made.options.get("base_id") == base.id for made in lineage)
        if is_hub_id(base.id) and (stated or not is_path(base)):
            return base
    what = f"calls its large model {known.id!r}" if known.id else "does not name its large model"
    raise OptionError(f"{options.adapter} {what}, which others do not have; add --base-id org/name")


def ladder_of(options: PushOptions, folder: Path) -> Ladder | None:
    """The ladder given, or the one of the run that the folder is part of."""
    run = folder.resolve().parent
    file = Path(options.ladder) if options.ladder else run / LADDER
    if options.ladder is None and not (file.is_file() and (run / RECORD).is_file() and is_final(folder, run)):
        return None
    body = read_json(file)
    body = body.get("ladder", body) if isinstance(body, dict) else body
    gain_stderr = None
    record = file.parent / RECORD
    if record.is_file():
        stages = {stage.get("name"): stage for stage in read_json(record).get("stages", ())}
        gain_stderr = stages.get("eval", {}).get("result", {}).get("gain_stderr")
    try:
        rungs = tuple(
            Rung(row["name"], float(row["loss"]), row.get("stderr"), row.get("accuracy")) for row in body["rows"]
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is no ladder ({error!r}); give the ladder.json of `loram run`") from None
    return Ladder(rungs, gain_stderr)


def is_final(folder: Path, run: Path) -> bool:
    """Whether a folder is the adapter that a run ended with, which its ladder is about."""
    touch_up = read_json(run / RECORD).get("options", {}).get("touch_up", 0)
    return str(folder.resolve()) == final_adapter(run, touch_up)


def steps_of(trained: Path) -> int | None:
    """How many steps a training took, by the last line of its metrics."""
    file = trained / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in reversed(lines):
        try:
            step = json.loads(line).get("step")
        except (ValueError, AttributeError):
            continue
        if isinstance(step, int):
            return step
    return None
