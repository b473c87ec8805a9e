"""Weights and tokenizers from the Hugging Face hub: the only module that uses the network.

A file in the cache is used as it is, without asking the hub for a newer one: a voice is trained on
one set of base weights, and a start needs no network. The cache is the one that all programs over
`huggingface_hub` share; `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_TOKEN` and `HF_ENDPOINT`
are honoured by that library.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from csm_studio.checkpoints.hub_errors import (
    NotInRepoError,
    UnreachableError,
    explain,
    file_error,
    not_in_repo,
)
from csm_studio.checkpoints.sources import (
    CONFIG_FILE,
    CSM_SOURCES,
    SHARD_INDEX,
    SOURCES,
    TOKENIZER_FILE,
    WEIGHT_FILES,
)
from csm_studio.errors import HubError

Progress = Callable[[int, "int | None", str], None]
"""Called with bytes done, bytes in all (None if unknown) and the file's name."""

MAIN_REVISION = "main"


def fetch(
    repo_id: str,
    filename: str,
    *,
    revision: str = MAIN_REVISION,
    progress: Progress | None = None,
) -> Path:
    """Return a file of the hub, downloading it unless the cache holds it.

    Args:
        repo_id: `owner/name`.
        filename: Path of the file inside the repository.
        revision: Branch, tag or commit.
        progress: Called as the bytes arrive, and not at all for a file in the cache. A
            `CsmStudioError` it raises stops the download.

    Returns:
        The file's path in the cache. It must not be written to.

    Raises:
        HubError: The file cannot be had; the message says why and how to get it by hand.
    """
    from huggingface_hub import (
        constants,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    # HTTPError belongs to the client under huggingface_hub: httpx in 1.x, httpx2 in 2.x. The Xet
    # client reports a lost connection as RuntimeError, the name check is a ValueError.
    failures = (OSError, HTTPError, EntryNotFoundError, ValueError, RuntimeError)
    has_begun = False
    try:
        cached = try_to_load_from_cache(repo_id, filename, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        if cached is not None:
            # The library notes in the cache that a commit lacks a file.
            raise not_in_repo(repo_id, filename)
        if constants.HF_HUB_OFFLINE:
            why = "It is not in the cache, and HF_HUB_OFFLINE forbids the network. Unset it."
            raise file_error(repo_id, filename, why, kind=UnreachableError)
        # Asked first without retries: hf_hub_download tries an unreachable hub for half a minute.
        url = hf_hub_url(repo_id, filename, revision=revision)
        # A missing file makes hf_hub_download fail too, which notes the absence in the cache.
        with contextlib.suppress(EntryNotFoundError):
            _check_room(get_hf_file_metadata(url).size, repo_id, filename)
        has_begun = True
        bar = _make_bar(progress, filename)
        return Path(hf_hub_download(repo_id, filename, revision=revision, tqdm_class=bar))
    except failures as error:
        raise explain(error, repo_id, filename, has_begun=has_begun) from error


def fetch_model(repo_id: str, *, progress: Progress | None = None) -> Path:
    """Return a folder with a repository's safetensors weights, configuration and tokenizer.

    Only the files that are loaded are downloaded: `config.json` and `tokenizer.json` where the
    repository has them, and the weights (every shard of an index). Pickled weights never are.

    Args:
        repo_id: `owner/name`; one of `SOURCES`, or a repository laid out like them.
        progress: As in `fetch`.

    Returns:
        The folder, in the cache, all of one commit.

    Raises:
        HubError: The repository has no safetensors weights, or a file cannot be had.
    """
    revision = MAIN_REVISION
    for filename in (CONFIG_FILE, TOKENIZER_FILE):
        try:
            companion = fetch(repo_id, filename, revision=revision, progress=progress)
        except (NotInRepoError, UnreachableError):
            # Weights brought by hand into the cache serve without a network; absent weights fail.
            continue
        # Everything else from this commit, even if the branch moves meanwhile.
        revision = companion.parent.name
    source = SOURCES.get(repo_id)
    candidates = source.filenames if source else WEIGHT_FILES
    weights = _fetch_first(repo_id, candidates, revision, progress)
    if weights.name == SHARD_INDEX:
        for shard in _shards(weights, repo_id):
            fetch(repo_id, shard, revision=weights.parent.name, progress=progress)
    return weights.parent


def _fetch_first(
    repo_id: str, candidates: tuple[str, ...], revision: str, progress: Progress | None
) -> Path:
    unreachable: UnreachableError | None = None
    for filename in candidates:
        try:
            return fetch(repo_id, filename, revision=revision, progress=progress)
        except NotInRepoError:
            continue
        except UnreachableError as error:
            # Another candidate may be in the cache.
            unreachable = unreachable or error
    if unreachable is not None:
        raise unreachable
    raise HubError(
        f"{repo_id}: the repository has none of {', '.join(candidates)}. Choose one with "
        f"safetensors weights, such as {', '.join(source.repo_id for source in CSM_SOURCES)}."
    )


def _shards(index: Path, repo_id: str) -> list[str]:
    """Return the files that an index lists, refusing anything but safetensors beside it."""
    try:
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(
            f"{index}: not an index of safetensors shards ({error!r}). Delete the file and run "
            f"the command again; if it stays so, {repo_id} is broken: choose another repository."
        ) from error
    for shard in listed:
        is_beside = isinstance(shard, str) and PurePosixPath(shard).name == shard
        if not is_beside or not shard.endswith(".safetensors"):
            raise HubError(
                f"{index}: lists {shard!r}, which is no safetensors file beside it. "
                "Choose another repository."
            )
    return sorted(listed)


def _make_bar(progress: Progress | None, filename: str) -> type:
    """Return a bar class for huggingface_hub that draws nothing and reports to `progress`."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self._num_done = int(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            self._num_done += int(n or 0)
            if progress is not None:
                progress(self._num_done, self.total, filename)

        # With these two, the library makes one bar (bytes on disk) for a Xet download, not two.
        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_transfer_postfix_str(self, *args: Any, **kwargs: Any) -> None:
            pass

    return Bar


def _check_room(size_bytes: int | None, repo_id: str, filename: str) -> None:
    """Refuse a download that the disk of the cache has no room for."""
    from huggingface_hub import constants

    if size_bytes is None:
        return
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < size_bytes:
        raise file_error(
            repo_id,
            filename,
            f"It takes {size_bytes / 1e9:.2f} GB and {free_bytes / 1e9:.2f} GB are free at {cache}."
            " Free some space, or set HF_HOME to a folder on a larger disk.",
        )
