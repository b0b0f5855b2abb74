"""Repositories of the Hugging Face hub: their names, some of their files, and why they could not be had."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from layerskip_model.errors import UserError


def is_hub_name(name: str) -> bool:
    """Whether what is no path of this machine can be a repository: owner/name."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


@cache  # the hub is asked once a process
def hub_files(what: str, name: str, patterns: tuple[str, ...]) -> Path:
    """A directory with a repository's files of these names, from the local cache where they are in it.

    Raises UserError, which begins with `what`, where the hub does not give them.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        raise hub_refusal(what, error) or UserError(
            f"{what} cannot be had from the hub ({reason})"
        ) from error


def hub_refusal(what: str, error: BaseException) -> UserError | None:
    """The error for a repository that is closed, missing or out of reach, if that is among the causes."""
    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return UserError(
            f"{what} is gated: ask for access on its page on the hub, then set HF_TOKEN to a token of yours"
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return UserError(
            f"{what}: no such directory, and on the hub missing or private; check the name, or set HF_TOKEN to a "
            "token that may read it"
        )
    if any(isinstance(cause, LocalEntryNotFoundError | ConnectionError) for cause in causes):
        return UserError(
            f"{what}: no such directory, not in the local cache, and the hub could not be reached; "
            "check the name, the connection and HF_HUB_OFFLINE"
        )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
