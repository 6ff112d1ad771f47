"""push: a verified adapter, or a merged model, on the Hub, with a card that says what is known and nothing else."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram.artifact import Base, require_folder
from loram.errors import HubError, OptionError
from loram.hub.download import fetched, is_hub_id, is_path
from loram.hub.upload import Hub, License, Target
from loram.memory import format_bytes
from loram.option_fields import command_line
from loram.options import PushOptions
from loram.progress import SILENT, Progress
from loram.results import StageResult
from loram.version import __version__

if TYPE_CHECKING:
    from loram.hub.contents import HubFile
    from loram.stages.publication import Publication

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PushResult(StageResult):
    """What was sent (or, after a dry run, would be) and where it is."""

    url: str
    files: dict[str, int]
    visibility: str
    state: str
    card: str
    pushed: bool

    def to_json(self) -> dict[str, Any]:
        """url, files {name: bytes}, visibility, state, pushed, card."""
        body = {key: getattr(self, key) for key in ("url", "files", "visibility", "state", "pushed", "card")}
        return super().to_json() | body

    def summary(self) -> str:
        """Files, sizes and target; the card as well where nothing was uploaded."""
        rows = [f"{format_bytes(size):>12}  {name}" for name, size in self.files.items()]
        total = f"{format_bytes(sum(self.files.values())):>12}  in {len(self.files)} files"
        if self.pushed:
            return f"{total}\n{self.url} ({self.visibility})"
        where = f"to {self.url}: {self.state}, {self.visibility}"
        return "\n".join([*rows, total, where, "", self.card.rstrip(), "", "nothing was uploaded (--dry-run)"])


@dataclass(frozen=True)
class Surroundings:
    """What the Hub says: the repository as it is, the license of the base's card, which data sets it has."""

    target: Target
    license: License | None
    datasets: tuple[str, ...] = ()
    known: bool = True


def push(options: PushOptions, progress: Progress = SILENT) -> PushResult:
    """Say who we are, verify, show what would go, upload, commit once."""
    if not is_hub_id(options.to):
        raise OptionError(f"--to is {options.to!r}; expected a repository on the Hub such as user/name")
    asked, options = options, fetched(options)
    require_folder(options.adapter)
    hub = Hub()
    if not options.dry_run:
        hub.whoami(options.to)  # before anything that takes long, the import of torch included
    from loram.hub.card import render
    from loram.stages.publication import gather

    found = gather(options)
    around = look_around(hub, options, found)
    check_target(options, around.target)
    card = render(found.facts(options.to, around.license, around.datasets))
    files = contents(found, card)
    result = PushResult(
        url=around.target.url,
        files={file.name: file.size for file in files},
        visibility=visibility(options, around.target),
        state=state(options, around),
        card=card,
        pushed=False,
        next_command=command_line("push", replace(asked, dry_run=False)),
    )
    if options.dry_run:
        return result
    hub.check_card(options.to, card)
    confirm(options, around.target, result, progress)
    url = upload(hub, options, around.target, files, progress)
    return replace(result, url=url, pushed=True, next_command="")


def check_ahead(options: PushOptions, base: Base, stated: str | None) -> None:
    """Before a run of hours that ends in a push: refuse what would be refused at its end.

    `base` describes the large model, `stated` is the id that an earlier section gives it.
    """
    if not is_hub_id(options.to):
        raise OptionError(f"push: to is {options.to!r}; expected a repository on the Hub such as user/name")
    if not (options.base_id or stated) and (not is_hub_id(base.id) or is_path(base)):
        raise OptionError(
            f"push: the large model is {base.id!r}, which others do not have; add base_id: org/name to the section push"
        )
    if not options.dry_run:
        hub = Hub()
        hub.whoami(options.to)
        check_target(options, hub.look_up(options.to))


def look_around(hub: Hub, options: PushOptions, found: Publication) -> Surroundings:
    """Ask the Hub; a dry run goes without where it cannot be asked, and says so."""
    try:
        if options.dry_run:
            hub.whoami(options.to)
        target = hub.look_up(options.to)
        license = hub.license_of(found.base.id)
        datasets = tuple(name for name in found.datasets if hub.has_dataset(name))
    except HubError as error:
        if not options.dry_run:
            raise
        logger.warning("%s", error)
        license = License(options.license) if options.license else None
        return Surroundings(Target(options.to, hub.url(options.to), exists=False), license, known=False)
    if license is None:
        license = License(options.license) if options.license else None
    elif options.license not in (None, license.id):
        logger.warning("%s is under %s; the card says that, not %s", found.base.id, license.id, options.license)
    if license is None:
        logger.warning("the license of %s is not known, so the card names none; add --license ID", found.base.id)
    return Surroundings(target, license, datasets)


def check_target(options: PushOptions, target: Target) -> None:
    """Refuse what would show the files to everybody unasked, and a pull request to nothing."""
    if target.private is False and not options.public:
        raise OptionError(f"{target.id} is public: everybody would see the upload; add --public if that is meant")
    if options.pr and not target.exists and not options.dry_run:
        raise HubError(
            f"the Hub has no {target.id} that a pull request could go to (404); push without --pr to make it"
        )


def visibility(options: PushOptions, target: Target) -> str:
    """Who will see the files. A pull request leaves the repository as it is."""
    if options.pr and target.private is not None:
        return "private" if target.private else "public"
    return "public" if options.public else "private"


def state(options: PushOptions, around: Surroundings) -> str:
    """What will become of the repository."""
    if not around.known:
        return "the Hub could not be asked"
    if options.pr:
        return "a pull request"
    return "an update" if around.target.exists else "a new repository"


def contents(found: Publication, card: str) -> list[HubFile]:
    """Everything that goes up, the card first."""
    from loram.hub.contents import CARD, HubFile, adapter_files, manifest_file, model_files

    files = model_files(found.folder) if found.kind == "merged-model" else adapter_files(found.folder, found.base)
    extra = [manifest_file(found.manifest, found.base, files)] if found.manifest else []
    return [HubFile(CARD, card.encode()), *files, *extra]


def confirm(options: PushOptions, target: Target, result: PushResult, progress: Progress) -> None:
    """Ask. Where nobody can be asked, only what is private and replaces nothing goes without --yes."""
    if options.yes:
        return
    size = format_bytes(sum(result.files.values()))
    what = f"{len(result.files)} files ({size}) to {target.url}, {result.state}, {result.visibility}"
    answer = progress.ask(f"upload {what}?")
    if answer is False:
        raise OptionError("nothing was uploaded: the answer was no")
    harmless = result.visibility == "private" and target.empty and not options.pr
    if answer is None and not harmless:
        raise OptionError(f"would upload {what}, and nobody can be asked; add --yes")


def upload(hub: Hub, options: PushOptions, target: Target, files: list[HubFile], progress: Progress) -> str:
    """Make the repository where there is none, send the files, open it to everybody last."""
    if not target.exists:
        target = hub.create(target, public=options.public)
    progress.begin("push", sum(file.size for file in files))
    message = f"loram {__version__}: {Path(options.adapter).resolve().name}"
    url = hub.send(target, files, message, pull_request=options.pr, sent=progress.advance)
    progress.end()
    if options.public and target.private and not options.pr:
        hub.publish(target)
    return url
