"""One live process at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from csm_studio.errors import WorkspaceError
from csm_studio.files import write_json

_START_TOLERANCE_S = 1.0


def process_started() -> float:
    """Return when this process started, in seconds since 1970."""
    return psutil.Process().create_time()


def process_is_alive(pid: object, started: object) -> bool:
    """Tell whether a process runs, and is the one meant: its number may have been given again.

    Args:
        pid: The process's number, as read from a file.
        started: What `process_started` said in that process.
    """
    if not isinstance(pid, int) or not isinstance(started, (int, float)):
        return False
    try:
        process = psutil.Process(pid)
        # A killed process that its parent has not asked after still has its number.
        gone = process.status() == psutil.STATUS_ZOMBIE
        return not gone and abs(process.create_time() - started) < _START_TOLERANCE_S
    except (psutil.Error, ValueError, OverflowError):
        return False


class FolderLock:
    """A file that says which process has a folder, and how many times that process opened it.

    Args:
        path: The lock file; its folder exists when the lock is taken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def acquire(self) -> None:
        """Take the lock for this process, over from a dead one if need be.

        Raises:
            WorkspaceError: Another live process has it.
            OSError: The folder cannot be written to.
        """
        with _guarded(self.path.parent):
            held = self._read()
            num_opens = 0
            if process_is_alive(held.get("pid"), held.get("process_started")):
                if held["pid"] != os.getpid():
                    raise WorkspaceError(
                        f"{self.path.parent}: is open in another window of the program (process"
                        f" {held['pid']}). Close that one, or choose another workspace."
                    )
                num_opens = held["num_opens"]
            self._write(num_opens + 1)

    def release(self) -> None:
        """Give up one opening; the last one removes the file."""
        with _guarded(self.path.parent):
            held = self._read()
            if held.get("pid") != os.getpid():
                return
            if held["num_opens"] > 1:
                self._write(held["num_opens"] - 1)
            else:
                self.path.unlink()

    def _read(self) -> dict[str, Any]:
        """Return what the file says; nothing where it is missing or damaged, as by power loss."""
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return held if isinstance(held, dict) and isinstance(held.get("num_opens"), int) else {}

    def _write(self, num_opens: int) -> None:
        held = {
            "pid": os.getpid(),
            "process_started": process_started(),
            "num_opens": num_opens,
        }
        write_json(self.path, held)


@contextlib.contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """Keep two processes from reading and replacing the lock file at the same moment."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # Some network drives cannot lock.
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
