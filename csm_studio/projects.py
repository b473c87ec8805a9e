"""A project's folder: the path of everything in it, and of what a browser names."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from csm_studio.errors import WorkspaceError

MAX_NAME_LENGTH = 64
"""Of a project's folder, and of what comes before the date in a run's or an export's."""

MAX_FILE_NAME_BYTES = 255

_MAX_SHOWN_LETTERS = 80

Kind = Literal["run", "checkpoint", "export", "generation", "clip", "original"]
"""What an id that came from the browser stands for."""


@dataclass(frozen=True)
class Project:
    """A project's folder and what is kept in it.

    Attributes:
        folder: The folder; its name is the project's name.
        title: What people call it.
        created_at: Date and time, ISO 8601 in UTC; "" where it is not known.
    """

    folder: Path
    title: str
    created_at: str

    @property
    def name(self) -> str:
        """The folder's name, which never changes."""
        return self.folder.name

    @property
    def dataset(self) -> Path:
        """Folder of the transcript table."""
        return self.folder / "dataset"

    @property
    def originals(self) -> Path:
        """Folder of the recordings as they were brought in; never changed."""
        return self.dataset / "originals"

    @property
    def audio(self) -> Path:
        """Folder of the working copies, one per clip."""
        return self.dataset / "audio"

    @property
    def runs(self) -> Path:
        """Folder of the training runs."""
        return self.folder / "runs"

    @property
    def exports(self) -> Path:
        """Folder of the merged models."""
        return self.folder / "exports"

    @property
    def generations(self) -> Path:
        """Folder of generated speech."""
        return self.folder / "generations"

    def new_run_dir(self, kind: str) -> Path:
        """Make an empty folder for a training run, such as `runs/lora-2026-11-22-1`."""
        return _new_dated_folder(self.runs, kind)

    def new_export_dir(self, stem: str) -> Path:
        """Make an empty folder for a merged model, such as `exports/my-voice-2026-11-22-1`."""
        return _new_dated_folder(self.exports, stem)

    def resolve(self, kind: Kind, name: str, run: str | None = None) -> Path:
        """Turn an id from the browser into the path of something that is there.

        Args:
            kind: What the id stands for.
            name: The name of a run or an export, the file name of a checkpoint, a clip or an
                original, or the id of a generation (its wav file is returned).
            run: The run that a checkpoint belongs to.

        Raises:
            WorkspaceError: The id is no plain name, or nothing of that kind is there.
        """
        if kind == "checkpoint":
            if run is None:
                raise WorkspaceError(f"checkpoint {shown(name)}: name the run that it is of.")
            return resolve_inside(self.resolve("run", run), name, self.folder)
        folder = {
            "run": self.runs,
            "export": self.exports,
            "generation": self.generations,
            "clip": self.audio,
            "original": self.originals,
        }[kind]
        is_folder = kind in ("run", "export")
        suffix = ".wav" if kind == "generation" else ""
        return resolve_inside(folder, name, self.folder, suffix=suffix, is_folder=is_folder)


def resolve_inside(
    folder: Path,
    name: str,
    limit: Path | None = None,
    *,
    suffix: str = "",
    is_folder: bool = False,
) -> Path:
    """Return the path of a folder's entry, given by a name that is not to be trusted.

    Args:
        folder: Where the entry must lie.
        name: Its name, without `suffix`.
        limit: A folder that `folder` must not have left by a link; None takes `folder` itself.
        suffix: Put behind the name.
        is_folder: Whether the entry must be a folder, or a file.

    Raises:
        WorkspaceError: The name is no plain file name, nothing of the kind is there, or a link
            leads elsewhere.
    """
    if problem := name_problem(name) or name_problem(name + suffix):
        raise WorkspaceError(f"{shown(name)} is no name of a file here: {problem}.")
    path = folder / (name + suffix)
    try:
        real, real_folder = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # Links that lead in a circle.
        raise WorkspaceError(f"{name}: cannot be looked up ({error}).") from error
    if limit is not None and not real_folder.is_relative_to(limit.resolve()):
        raise WorkspaceError(f"{folder}: is a link that leaves {limit}. Put a folder there.")
    if not real.is_relative_to(real_folder):
        raise WorkspaceError(f"{name}: is a link that leaves {folder}. Put the file there itself.")
    if not (real.is_dir() if is_folder else real.is_file()):
        raise WorkspaceError(f"{name}: not found in {folder.name}. It may have been deleted.")
    return path


def name_problem(name: object) -> str:
    """Say why something cannot be the name of a file in a folder of ours, or return ""."""
    if not isinstance(name, str):
        return "it is not text"
    if not name or name.startswith("."):
        return "it is empty or starts with a dot"
    if any(letter in "/\\" or not letter.isprintable() for letter in name):
        return "it has a slash or an unprintable character"
    if len(name.encode()) > MAX_FILE_NAME_BYTES:
        return "it is too long"
    return ""


def slug(text: str, fallback: str) -> str:
    """Return text as small ASCII letters and digits, joined by hyphens."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9_]+", "-", plain).strip("-")[:MAX_NAME_LENGTH].strip("-") or fallback


def _new_dated_folder(parent: Path, stem: str) -> Path:
    """Make `parent/STEM-DATE-N`, with N one above the highest there."""
    start = f"{slug(stem, 'new')}-{datetime.now():%Y-%m-%d}-"
    parent.mkdir(parents=True, exist_ok=True)
    taken = (path.name.removeprefix(start) for path in parent.glob(f"{start}*"))
    number = 1 + max((int(end) for end in taken if end.isascii() and end.isdigit()), default=0)
    while True:
        target = parent / f"{start}{number}"
        try:
            target.mkdir()
            return target
        except FileExistsError:  # Another thread took it.
            number += 1


def shown(value: object) -> str:
    """Return a value from outside, short enough for a message."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_LETTERS else f"{text[:_MAX_SHOWN_LETTERS]}..."
