"""Whatever the Hub client raises, as one sentence. No token can get into one: known cases have our own words."""

from __future__ import annotations

import errno
import os
import re

from loram.errors import HubError, LoramError, ResourceError

TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9_]{4,}")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
AGAIN = "run the same command again: what was uploaded already is not sent twice"
WRITES = ("write to", "create")


def hub_failure(error: Exception, repo: str, doing: str) -> LoramError:
    """The error to raise for `error`, which happened while `doing` something to (read, write to, create) `repo`."""
    if isinstance(error, LoramError):
        return error
    chain = [error, *causes(error)]
    if any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) for one in chain):
        return ResourceError(f"the disk is full while fetching {repo}; free some space or move HF_HOME")
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    status = next((found for one in chain if (found := status_of(one)) is not None), None)
    if "LocalEntryNotFoundError" in names and status is None:
        why = "the Hub cannot be reached" + (" (HF_HUB_OFFLINE is set)" if "OfflineModeIsEnabled" in names else "")
        return HubError(
            f"{repo} is neither a folder nor in the Hub cache, and {why}; check the path, or go online and try again"
        )
    if "OfflineModeIsEnabled" in names:
        return HubError(f"HF_HUB_OFFLINE is set, so the Hub was not asked for {repo}; unset it, or give a folder")
    if "LocalTokenNotFoundError" in names:
        return HubError(f"no Hub token was found, and one is needed to {doing} {repo}; {LOG_IN}")
    if "GatedRepoError" in names:
        return HubError(
            f"{repo} is gated (403); ask for access on its Hub page, then {LOG_IN} of an account that has it"
        )
    if "RevisionNotFoundError" in names:
        return HubError(f"{repo} has no such revision (404); give a branch, a tag or a commit that it has")
    if status is not None:
        return HubError(status_sentence(status, repo, doing, "RepositoryNotFoundError" in names))
    if is_network(chain):
        again = "try again" if doing == "read" else AGAIN
        return HubError(f"the Hub cannot be reached to {doing} {repo} ({reason(chain[-1])}); go online and {again}")
    return HubError(f"the Hub client could not {doing} {repo}: {reason(error)}")


def causes(error: BaseException) -> list[BaseException]:
    """What led to an error, nearest first."""
    found: list[BaseException] = []
    cause = error.__cause__ or error.__context__
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error carries."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def status_sentence(status: int, repo: str, doing: str, not_found: bool) -> str:
    """What a status means here and what to do."""
    if status == 404 or (status == 401 and not_found and doing == "read"):
        return f"the Hub has no {repo}, or this token may not see it ({status}); check the id, or {LOG_IN}"
    match status:
        case 401:
            return f"the Hub did not accept the token (401) to {doing} {repo}; {LOG_IN} to one that is valid"
        case 403:
            right = "write" if doing in WRITES else "read"
            return f"this token may not {doing} {repo} (403); {LOG_IN} to one with {right} permission there"
        case 409 | 412:
            return (
                f"{repo} was created or changed by somebody else at the same time ({status}); look at it and push again"
            )
        case 429:
            return f"the Hub has had too many requests (429) and did not {doing} {repo}; wait a few minutes and {AGAIN}"
    if status >= 500:
        return f"the Hub is in trouble ({status}) and did not {doing} {repo}; wait a few minutes and {AGAIN}"
    return f"the Hub refused to {doing} {repo} ({status}); run again with -v to see its answer"


def is_network(chain: list[BaseException]) -> bool:
    """Whether a connection failed: errors of the HTTP client under the Hub's, timeouts, and sockets'."""
    modules = {kind.__module__.partition(".")[0] for one in chain for kind in type(one).__mro__}
    return any(name.startswith(("httpx", "httpcore")) for name in modules) or any(
        isinstance(one, ConnectionError | TimeoutError) for one in chain
    )


def reason(error: BaseException) -> str:
    """The first line of an error's text, without anything that looks like a token."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact(lines[0])[:200] if lines else type(error).__name__


def redact(text: str) -> str:
    """A text without tokens: a server may repeat what it was sent, and a traceback shows what the server said."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            text = text.replace(os.environ[name], "hf_…")
    return TOKEN.sub("hf_…", text)
