"""Talking to the Hub as a writer: who we are, what the repository is, what the base's card says, one commit.

Files go up one by one and become visible with a single commit, so that a repository never holds half of a push.
No torch here: a wrong token is found out before anything heavy is imported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from loram.errors import HubError
from loram.hub.failures import hub_failure, reason, status_of

if TYPE_CHECKING:
    from loram.hub.contents import HubFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class License:
    """A license as model cards write it; `name` and `link` belong to the license `other`."""

    id: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Target:
    """The repository to write to, as it is now. `private` is None where it does not exist or could not be asked for.

    `empty`: it holds no file yet, as one does in which an earlier push was cut off.
    """

    id: str
    url: str
    exists: bool
    private: bool | None = None
    commit: str | None = None
    empty: bool = True


class Hub:
    """The Hub of HF_ENDPOINT, with the token of HF_TOKEN or of `hf auth login`."""

    def __init__(self) -> None:
        self.api = HfApi(library_name="loram")

    def url(self, repo: str) -> str:
        """The address of a repository's page."""
        return f"{self.api.endpoint}/{repo}"

    def whoami(self, repo: str) -> str:
        """The name behind the token."""
        with translated(repo, "write to"):
            return str(self.api.whoami()["name"])

    def look_up(self, repo: str) -> Target:
        """What the Hub has under that id."""
        try:
            info = self.api.model_info(repo)
        except GatedRepoError as error:
            raise hub_failure(error, repo, "read") from error
        except RepositoryNotFoundError as error:
            if status_of(error) == 401:  # the token was accepted before: what it may not see is not there for it
                logger.debug("%s is not visible to this token", repo)
            return Target(repo, self.url(repo), exists=False)
        except Exception as error:
            raise hub_failure(error, repo, "read") from error
        names = {item.rfilename for item in info.siblings or ()}
        return Target(repo, self.url(repo), True, bool(info.private), info.sha, empty=names <= {".gitattributes"})

    def license_of(self, base: str) -> License | None:
        """The license in the base's card; None where it says none or the base is not on the Hub."""
        try:
            card: Any = self.api.model_info(base).card_data
        except HfHubHTTPError as error:
            if status_of(error) in (401, 403, 404):
                logger.warning("the Hub does not show %s to this token; the card names it all the same", base)
                return None
            raise hub_failure(error, base, "read") from error
        except Exception as error:
            raise hub_failure(error, base, "read") from error
        found = card.get("license") if card is not None else None
        if not isinstance(found, str) or found == "unknown":
            return None
        return License(found, card.get("license_name"), card.get("license_link"))

    def has_dataset(self, name: str) -> bool:
        """Whether the Hub has a data set of that id."""
        try:
            self.api.dataset_info(name)
        except HfHubHTTPError as error:
            if status_of(error) in (401, 403, 404):
                return False
            raise hub_failure(error, name, "read") from error
        except Exception as error:
            raise hub_failure(error, name, "read") from error
        return True

    def check_card(self, repo: str, card: str) -> None:
        """Have the Hub look at the card's header before anything is uploaded."""
        try:
            ModelCard(card).validate()
        except ValueError as error:
            raise HubError(f"the Hub refuses the card for {repo}: {reason(error)}") from error
        except Exception as error:
            raise hub_failure(error, repo, "write to") from error

    def create(self, target: Target, *, public: bool) -> Target:
        """The repository, made now."""
        with translated(target.id, "create"):
            self.api.create_repo(target.id, private=not public)
        return replace(target, exists=True, private=not public)

    def publish(self, target: Target) -> None:
        """Make a private repository public."""
        with translated(target.id, "write to"):
            self.api.update_repo_settings(target.id, private=False)

    def send(
        self,
        target: Target,
        files: Sequence[HubFile],
        message: str,
        *,
        pull_request: bool,
        sent: Callable[[int], None],
    ) -> str:
        """Upload, then commit on top of what `look_up` saw; the address of the repository or of the pull request."""
        with translated(target.id, "write to"):
            operations = []
            for file in files:
                operation = CommitOperationAdd(file.name, file.source)
                self.api.preupload_lfs_files(target.id, [operation], create_pr=pull_request)
                operations.append(operation)
                sent(file.size)
            commit = self.api.create_commit(
                target.id, operations, commit_message=message, create_pr=pull_request, parent_commit=target.commit
            )
        if pull_request and not commit.pr_url:
            raise HubError(f"{target.id} was not changed, so no pull request was opened")
        return str(commit.pr_url) if pull_request else target.url


@contextmanager
def translated(repo: str, doing: str) -> Iterator[None]:
    """What the client raises in the block, as loram's own errors."""
    try:
        yield
    except Exception as error:
        raise hub_failure(error, repo, doing) from error
