"""Where everything is kept: a folder of projects, and the path of every file in them.

projects/NAME/project.json    title, created_at
projects/NAME/dataset/        the transcript table, originals/ (never changed), audio/
projects/NAME/runs/RUN/       a training run
projects/NAME/exports/EXPORT/ a merged model
projects/NAME/generations/    ID.wav with ID.json
cache/                        what can be made again: codes, waveforms, temporary files
trash/NAME-TIMESTAMP/         deleted projects
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from csm_studio.errors import WorkspaceError
from csm_studio.files import write_json
from csm_studio.locks import FolderLock
from csm_studio.projects import MAX_FILE_NAME_BYTES, MAX_NAME_LENGTH, Project, shown, slug

LOCK_NAME = ".csm_studio.lock"
MANIFEST = "project.json"

MAX_TITLE_LENGTH = 200

_NAME = re.compile(rf"[a-z0-9_-]{{1,{MAX_NAME_LENGTH}}}")


class Workspace:
    """A folder of projects, open in one process at a time.

    Args:
        root: The folder. Nothing is made or read before `open`.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.projects_dir = self.root / "projects"
        self.trash = self.root / "trash"
        self.cache = self.root / "cache"
        self.codes_cache = self.cache / "codes"
        self.waveforms_cache = self.cache / "waveforms"
        self.temporary = self.cache / "temporary"
        self._lock = FolderLock(self.root / LOCK_NAME)
        self._is_open = False

    def open(self) -> Workspace:
        """Make the folders and take the workspace for this process.

        Raises:
            WorkspaceError: The root is a file, cannot be written to, or is open in another process.
        """
        if self._is_open:
            return self
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            raise self._unusable(error) from error
        self._is_open = True
        try:
            for folder in (
                *(self.projects_dir, self.trash),
                *(self.codes_cache, self.waveforms_cache, self.temporary),
            ):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.close()
            raise self._unusable(error) from error
        return self

    def close(self) -> None:
        """Let another process open the workspace."""
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(OSError):  # A lock left behind is stale when the process ends.
                self._lock.release()

    def __enter__(self) -> Workspace:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def projects(self) -> list[Project]:
        """Return all projects, the oldest first."""
        folders = self.projects_dir.iterdir() if self.projects_dir.is_dir() else ()
        found = [_read_project(folder) for folder in folders if _is_project(folder)]
        return sorted(found, key=lambda project: (project.created_at, project.name))

    def project(self, name: str) -> Project:
        """Return the project of that name (not title).

        Raises:
            WorkspaceError: The name is malformed, or there is no such project.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise WorkspaceError(
                f"{shown(name)} is no project name: use small letters, digits, - and _, at most"
                f" {MAX_NAME_LENGTH}."
            )
        folder = self.projects_dir / name
        if not _is_project(folder):
            raise WorkspaceError(f"project {name}: not found in {self.root}. Choose another one.")
        return _read_project(folder)

    def create_project(self, title: str) -> Project:
        """Make an empty project, in a folder named after the title."""
        title = _checked_title(title)
        self._check_open()
        created_at = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        # Made under a hidden name, so that a crash leaves no half-made project in the list.
        hidden = Path(tempfile.mkdtemp(dir=self.projects_dir, prefix=".new-"))
        hidden.chmod(self.projects_dir.stat().st_mode & 0o777)
        made = Project(hidden, title, created_at)
        for folder in (made.originals, made.audio, made.runs, made.exports, made.generations):
            folder.mkdir(parents=True)
        write_json(hidden / MANIFEST, {"title": title, "created_at": created_at})
        name = slug(title, "project")
        target = _move_to_free_name(hidden, self.projects_dir, name, MAX_NAME_LENGTH)
        return Project(target, title, created_at)

    def rename_project(self, name: str, title: str) -> Project:
        """Change a project's title; its folder keeps its name, and with it every path."""
        project, title = self.project(name), _checked_title(title)
        self._check_open()
        write_json(project.folder / MANIFEST, {"title": title, "created_at": project.created_at})
        return Project(project.folder, title, project.created_at)

    def delete_project(self, name: str) -> Path:
        """Move a project into the trash, from where it can be taken back by hand.

        Returns:
            Its folder in the trash.
        """
        project = self.project(name)
        self._check_open()
        name = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        return _move_to_free_name(project.folder, self.trash, name, MAX_FILE_NAME_BYTES)

    def disk_free_bytes(self) -> int:
        """Return the free space of the disk that the workspace is on, or will be."""
        there = next(folder for folder in (self.root, *self.root.parents) if folder.exists())
        return shutil.disk_usage(there).free

    def _check_open(self) -> None:
        if not self._is_open:
            raise WorkspaceError(f"{self.root}: the workspace is not open. Open it first.")

    def _unusable(self, error: OSError) -> WorkspaceError:
        if self.root.exists() and not self.root.is_dir():
            problem = "is a file"
        else:
            problem = f"cannot be written to ({error.strerror})"
        return WorkspaceError(f"{self.root}: {problem}. Choose another folder for the workspace.")


def _is_project(folder: Path) -> bool:
    is_named = _NAME.fullmatch(folder.name) is not None
    return is_named and folder.is_dir() and not folder.is_symlink()


def _read_project(folder: Path) -> Project:
    """Read a project; one whose manifest is lost keeps its name for a title, and its data."""
    values: Any = {}
    with contextlib.suppress(OSError, ValueError):
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    values = values if isinstance(values, dict) else {}
    title, created_at = values.get("title"), values.get("created_at")
    return Project(
        folder,
        title if isinstance(title, str) else folder.name,
        created_at if isinstance(created_at, str) else "",
    )


def _checked_title(title: str) -> str:
    words = " ".join(title.split()) if isinstance(title, str) else ""
    if not words:
        raise WorkspaceError("The project has no title. Write one.")
    if not words.isprintable() or len(words) > MAX_TITLE_LENGTH:
        raise WorkspaceError(
            f"The title {shown(words)} is too long or has unprintable characters. Use at most"
            f" {MAX_TITLE_LENGTH} letters."
        )
    return words


def _move_to_free_name(folder: Path, parent: Path, name: str, max_length: int) -> Path:
    """Move a folder to `parent/name`, or the first free `parent/name-N`."""
    number = 0
    while True:
        number += 1
        suffix = f"-{number}" if number > 1 else ""
        target = parent / f"{name[: max_length - len(suffix)]}{suffix}"
        if target.exists():
            continue
        try:
            return folder.rename(target)
        except OSError as error:
            if not target.exists():  # Otherwise another thread took the name.
                raise WorkspaceError(
                    f"{folder}: cannot be moved to {target} ({error.strerror})."
                ) from error
