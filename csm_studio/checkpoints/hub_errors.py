"""What went wrong with a file of the hub, and how to get the file all the same."""

from __future__ import annotations

import errno

from csm_studio.checkpoints.sources import SOURCES
from csm_studio.errors import HubError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (401, 403)
_TRY_LATER = (408, 429, 500, 502, 503, 504)


class NotInRepoError(HubError):
    """The repository is there, the file is not."""


class UnreachableError(HubError):
    """The file is not in the cache and the hub cannot be asked."""


def explain(error: BaseException, repo_id: str, filename: str, *, has_begun: bool) -> HubError:
    """Turn an exception of huggingface_hub or of the disk into an error that says what to do.

    Args:
        error: What was raised.
        repo_id: `owner/name`.
        filename: The file that was asked for.
        has_begun: Whether the hub had already answered for this file.
    """
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{repo_id!r} is not the name of a repository. Give it as owner/name.")
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        # The library's own wrapper around what went wrong on the way to the hub.
        return explain(error.__cause__, repo_id, filename, has_begun=has_begun)
    if isinstance(error, errors.EntryNotFoundError):
        return not_in_repo(repo_id, filename)
    if isinstance(error, errors.HfHubHTTPError):
        return file_error(repo_id, filename, _why_refused(error, repo_id))
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        why = (
            f"The disk of {constants.HF_HUB_CACHE} is full. Free some space, or set HF_HOME to a "
            "folder on a larger disk, and run the command again."
        )
        return file_error(repo_id, filename, why)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        why = (
            f"The cache cannot be used: {error.filename}: {error.strerror}. Mend it, or set "
            "HF_HOME to another folder."
        )
        return file_error(repo_id, filename, why)
    # FileMetadataError: something answered in the hub's place, such as a hotel's login page.
    if has_begun and not isinstance(error, errors.FileMetadataError):
        why = (
            f"The download broke off ({_one_line(error)}). Run the command again; if it breaks "
            "off each time, set HF_HUB_DISABLE_XET=1 to download over plain HTTPS."
        )
        return file_error(repo_id, filename, why)
    why = (
        f"{hub} cannot be reached ({_one_line(error)}). Check the network connection, the proxy "
        "settings and HF_ENDPOINT."
    )
    return file_error(repo_id, filename, why, kind=UnreachableError)


def not_in_repo(repo_id: str, filename: str) -> NotInRepoError:
    """Make the error for a file that the repository does not have."""
    from huggingface_hub import constants

    return NotInRepoError(
        f"{filename} of {repo_id}: the repository has no such file. "
        f"{constants.ENDPOINT}/{repo_id}/tree/main lists what it has."
    )


def file_error(
    repo_id: str, filename: str, why: str, *, kind: type[HubError] = HubError
) -> HubError:
    """Make the error for one file, with two ways to get the file by hand.

    Args:
        repo_id: `owner/name`.
        filename: The file.
        why: What is wrong and what to do about it, as sentences.
        kind: The class of the error.
    """
    from huggingface_hub import constants

    source = SOURCES.get(repo_id)
    licence = "accept the licence on its page, " if source and source.is_gated else ""
    folder = "models--" + repo_id.replace("/", "--")
    return kind(
        f"{filename} of {repo_id}: {why}\n"
        f"By hand: {licence}download {constants.ENDPOINT}/{repo_id}/resolve/main/{filename} and "
        "put it, under that name, into a model folder given with `--model DIR`.\n"
        f"Or, on a computer with a network: `hf download {repo_id} {filename}`, then copy the "
        f"folder {folder} from its cache into {constants.HF_HUB_CACHE}."
    )


def _why_refused(error: BaseException, repo_id: str) -> str:
    """Say why the hub answered, but not with the file."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return (
            "The repository is gated, and this account has no access. Accept the licence at "
            f"{hub}/{repo_id}, then run `hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"There is no repository {hub}/{repo_id}, or it is private. Check the name; for a "
            "private one run `hf auth login` or set HF_TOKEN."
        )
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if status in _NO_ACCESS:
        return (
            f"{hub} refused access (HTTP status {status}). HF_TOKEN or the saved token may not be "
            "valid: run `hf auth login`."
        )
    advice = (
        "Try again later."
        if status in _TRY_LATER
        else "Check the proxy settings and HF_ENDPOINT: this may not be the hub."
    )
    return f"{hub} answered with HTTP status {status}. {advice}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
