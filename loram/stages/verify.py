"""verify: is this base's adapter right, complete, finite and portable? Any PEFT LoRA folder may be given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loram.adapter import Adapter, check_finite, check_modules, expected_modules, load_adapter
from loram.artifact import Manifest, find_location, read_manifest, require_folder, sha256_file
from loram.checkpoint import Checkpoint
from loram.errors import FamilyError, LoramError, OptionError
from loram.families import family_of
from loram.hidden_update import HiddenUpdate, hidden_update
from loram.hub.download import fetched
from loram.options import VerifyOptions
from loram.portability import Verdict, portability
from loram.progress import SILENT, Progress
from loram.pruning_map import FILE as MAP_FILE
from loram.pruning_map import PruningMap, read_map
from loram.results import StageResult
from loram.stages.calibration_record import check_scales, rescaled
from loram.stages.lineage import check_base, check_digest, find_large
from loram.stages.masking import recorded
from loram.stages.project import project_adapter
from loram.stages.recover import recover_adapter
from loram.verification import Check, identity_gap, nonzero_shares

TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class VerifyResult(StageResult):
    """What was checked, what failed, and who can load the adapter."""

    checks: tuple[Check, ...]
    portable: dict[str, Verdict]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    @property
    def exit_code(self) -> int:
        """6 where a check failed."""
        return 0 if self.ok else 6

    def to_json(self) -> dict[str, Any]:
        """ok, checks[]{name,ok,detail}, portable.{peft,vllm,sglang,llama_cpp}."""
        return super().to_json() | {
            "ok": self.ok,
            "checks": [asdict(check) for check in self.checks],
            "portable": {name: verdict.ok for name, verdict in self.portable.items()},
            "notes": {name: verdict.note for name, verdict in self.portable.items() if verdict.note},
        }

    def summary(self) -> str:
        """A line per check, then the portability verdict."""
        lines = [f"{'ok  ' if c.ok else 'FAIL'} {c.name}{': ' if c.detail else ''}{c.detail}" for c in self.checks]
        verdicts = (f"{n} {'ok' if v.ok else 'no'}{f' ({v.note})' if v.note else ''}" for n, v in self.portable.items())
        return "\n".join([*lines, "portable: " + " | ".join(verdicts)])


def verify(options: VerifyOptions, progress: Progress = SILENT) -> VerifyResult:
    """Run every check; a failed one is reported, not raised."""
    asked, options = options, fetched(options)
    folder = require_folder(options.adapter)
    manifest = read_manifest(folder)
    adapter = load_adapter(folder)
    checks: list[Check] = []

    def check(name: str, look: Callable[[], str]) -> None:
        try:
            checks.append(Check(name, True, look()))
        except LoramError as error:
            checks.append(Check(name, False, str(error)))

    if manifest is not None:
        check("files", lambda: check_files(folder, manifest))
    check("finite", lambda: look_finite(adapter, folder))
    small = map_of(folder, options.small)
    if manifest is not None and manifest.kind == "small-adapter" and small is not None:
        check("map", lambda: check_digest(folder, small, manifest.pruning_map_sha256))
        check("modules and shapes", lambda: fits_map(adapter, small, folder))
    else:
        large = find_large(folder, manifest, options.large)
        base = manifest.base if manifest else None
        if large is None:
            checks.append(Check("modules and shapes", True, "not checked against a base: add --large FOLDER"))
        else:
            if base is not None:
                check("base", lambda: check_base(base, large))
            check("modules and shapes", lambda: fits_base(adapter, large, folder))
    check("non-zero", lambda: look_nonzero(adapter))
    if manifest is not None and manifest.calibration is not None:
        record = manifest.calibration
        check("scales", lambda: check_scales(record, adapter, small_adapter_of(folder), small, folder))
    if hidden := hidden_of(options, manifest, adapter, small):
        checks.append(Check("mask", True, str(hidden)))
    if options.numeric:
        check("identity", lambda: look_identity(options, manifest, adapter, small))
    complete = all(c.ok for c in checks if c.name in ("base", "map", "modules and shapes"))
    return VerifyResult(
        checks=tuple(checks),
        portable=portability(adapter, complete=complete and (manifest is None or manifest.kind != "small-adapter")),
        next_command=next_command(asked, manifest),
    )


def next_command(options: VerifyOptions, manifest: Manifest | None) -> str:
    """What to type next for this kind of adapter."""
    if manifest is not None and manifest.kind == "small-adapter":
        return f"loram recover {options.adapter} -o ADAPTER"
    return f"loram merge {options.adapter} -o MERGED"


def ancestors(folder: Path) -> Iterator[Path]:
    """The folder, its parents, their parents … as far as the location hints still hold."""
    yield folder
    manifest = read_manifest(folder)
    for parent in manifest.parents if manifest else ():
        found = find_location(parent.location, folder)
        known = read_manifest(found) if found is not None else None
        # A folder that was written anew since is no ancestor any more; one that loram did not write has no digest.
        if found is not None and parent.digest == (known.digest() if known else ""):
            yield from ancestors(found)


def map_of(folder: Path, small: str | None) -> PruningMap | None:
    """The pruning map in the adapter's folder, in the small model given, or in an ancestor.

    Where that knows its masks by digest only, the same map of an ancestor that has them, if there is one.
    """
    places = [*([Path(small)] if small else []), *ancestors(folder)]
    maps = [read_map(place) for place in places if (place / MAP_FILE).is_file()]
    if not maps:
        return None
    return next((found for found in maps if found.masks and found.sha256 == maps[0].sha256), maps[0])


def small_adapter_of(folder: Path) -> Adapter | None:
    """The small adapter that a recovered one was made from, if it is still where the manifest says."""
    for place in ancestors(folder):
        manifest = read_manifest(place)
        if manifest is not None and manifest.kind == "small-adapter":
            return load_adapter(place)
    return None


def check_files(folder: Path, manifest: Manifest) -> str:
    """Digests of the manifest against the files."""
    for name, digest in manifest.files.items():
        file = folder / name
        if not file.is_file() or sha256_file(file) != digest:
            raise OptionError(f"{file} {'was changed' if file.is_file() else 'is missing'} since it was written")
    return f"{len(manifest.files)} files as written"


def look_finite(adapter: Adapter, folder: Path) -> str:
    """No NaN, no Inf."""
    check_finite(adapter, folder)
    return f"{len(adapter.pairs)} modules"


def fits_map(adapter: Adapter, pruning_map: PruningMap, folder: Path) -> str:
    """A small adapter against the small model's shapes."""
    expected = expected_modules(adapter.config, pruning_map.family, pruning_map.small_geometry)
    to_large = pruning_map.numbering.to_large
    check_modules(adapter, lambda module: pruning_map.small_shape(to_large(module)), expected, folder)
    return f"{len(adapter.pairs)} modules fit the small model"


def fits_base(adapter: Adapter, large: Path, folder: Path) -> str:
    """An adapter against the headers of the base's shards; no weight is loaded."""
    with Checkpoint(large) as checkpoint:
        expected = declared_modules(adapter, checkpoint)

        def shape(module: str) -> tuple[int, ...]:
            tied = module == "lm_head" and "lm_head.weight" not in checkpoint
            return checkpoint.entry(f"{'model.embed_tokens' if tied else module}.weight").shape

        check_modules(adapter, shape, expected, folder)
    return f"{len(adapter.pairs)} modules fit {large}"


def declared_modules(adapter: Adapter, checkpoint: Checkpoint) -> set[str]:
    """What target_modules names; nothing for an architecture that is not in the tables (shapes are still checked)."""
    try:
        family = family_of(checkpoint.config)
    except FamilyError:
        return set()
    return expected_modules(adapter.config, family, family.geometry(checkpoint.config))


def look_nonzero(adapter: Adapter) -> str:
    """An adapter that changes nothing was not trained; a layer that is all zero is named."""
    shares = nonzero_shares(adapter)
    if not any(shares.values()):
        raise OptionError("every update is zero: the adapter was not trained")
    partial = [f"{layer} {share:.0%}" for layer, share in shares.items() if share < 1]
    return f"{len(shares) - len(partial)} of {len(shares)} layers whole" + (
        f"; {', '.join(partial)}" if partial else ""
    )


def hidden_of(
    options: VerifyOptions, manifest: Manifest | None, adapter: Adapter, small: PruningMap | None
) -> HiddenUpdate | None:
    """What masks hid of the update: by the masks where they are at hand, else as it was recorded; None without any."""
    noted = recorded(manifest)
    if small is None or not small.masks:
        return noted
    narrow = manifest is not None and manifest.kind == "small-adapter"
    masked = adapter.masked or (noted is not None and noted.masked)
    return hidden_update(adapter, small.mask_in_small if narrow else small.mask, masked)


def look_identity(options: VerifyOptions, manifest: Manifest | None, adapter: Adapter, small: PruningMap | None) -> str:
    """The LoRAM identity on one batch of random tokens."""
    import torch

    if manifest is not None and (manifest.kind, manifest.stage) == ("adapter", "train"):
        return "not checked: it was trained on the large model itself; the adapter that it began with may be asked"
    large = find_large(options.adapter, manifest, options.large)
    if large is None:
        raise OptionError("the identity needs the large model; add --large FOLDER")
    if small is None:
        raise OptionError("the identity needs the pruning map; add --small FOLDER")
    if manifest is not None and manifest.kind == "small-adapter":
        narrow, wide = adapter, recover_adapter(adapter, small, options.adapter)
    else:
        # The adapter it was made from, where it is still there: projecting back cannot see a wrong order.
        made_from, wide = small_adapter_of(Path(options.adapter)), adapter
        if made_from is None:
            narrow = project_adapter(adapter, small, options.adapter)
        else:
            narrow = rescaled(made_from, manifest.calibration if manifest else None, small, options.adapter)
    generator = torch.Generator().manual_seed(options.seed)
    tokens = torch.randint(0, small.geometry.vocab, (2, 32), generator=generator)
    noted = recorded(manifest)
    masked = narrow.masked or (noted is not None and noted.masked)
    gap = identity_gap(str(large), small, (narrow, wide), tokens, masked=masked)
    if not gap <= TOLERANCE:
        raise OptionError(f"logits differ by {gap:.1e} relative, more than {TOLERANCE:.0e}: the recovery is wrong")
    exact = "exactly" if gap == 0 else f"to {gap:.1e} relative"
    return f"logits agree {exact}" + (", the update masked on both sides" if masked else "")
