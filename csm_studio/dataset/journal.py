"""An append-only log of JSON lines, each on disk before `append` returns."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from csm_studio.errors import DatasetError
from csm_studio.files import sync

_BLOCK_BYTES = 1 << 16


class Journal:
    """A log in a file, one object per line; a line without its newline does not count.

    Args:
        path: The file. Nothing is made or read before `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = -1
        self._end = 0

    @property
    def end(self) -> int:
        """Position behind the last complete line."""
        return self._end

    @property
    def is_open(self) -> bool:
        """Whether the log can be written to."""
        return self._handle >= 0

    def open(self) -> None:
        """Open the log for this object alone, and drop a last line that a crash cut short.

        Raises:
            DatasetError: Somebody else has it open, or the file cannot be opened.
        """
        try:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.close()
                raise DatasetError(
                    f"{self.path.parent}: the table is open elsewhere. Close it there first."
                ) from error
            except OSError:  # Some network drives cannot lock.
                pass
            self._end = self._find_end()
            if self._size() > self._end:
                os.ftruncate(self._handle, self._end)
            sync(self.path.parent)
        except OSError as error:
            self.close()
            raise DatasetError(f"{self.path}: cannot be opened ({error.strerror}).") from error

    def close(self) -> None:
        """Close the file."""
        if self.is_open:
            os.close(self._handle)
            self._handle = -1

    def append(self, entry: Mapping[str, Any]) -> int:
        """Write an object as one line and wait until the disk has it.

        Returns:
            Where the line starts.

        Raises:
            DatasetError: It could not be written; the log is as before.
        """
        line = json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        start = self._end
        try:
            _write_all(self._handle, line, start)
            os.fsync(self._handle)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, start)
            raise DatasetError(
                f"{self.path}: the edit could not be saved ({error.strerror}), and was not made."
                " Make room on the disk and try again."
            ) from error
        self._end = start + len(line)
        return start

    def read(self, start: int) -> dict[str, Any]:
        """Return the object of the line that starts at a position.

        Raises:
            DatasetError: No whole line starts there.
        """
        with self.path.open("rb") as stream:
            stream.seek(start)
            return self._parsed(stream.readline(), start)

    def read_from(self, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield position and object of each line from a position on.

        Raises:
            DatasetError: A line is damaged.
        """
        with self.path.open("rb") as stream:
            stream.seek(start)
            for line in stream:
                yield start, self._parsed(line, start)
                start += len(line)

    def checksum(self, start: int, end: int) -> int:
        """Return a checksum (CRC-32) of the bytes from `start` to `end`, or of what is there."""
        with self.path.open("rb") as stream:
            stream.seek(start)
            return zlib.crc32(stream.read(end - start))

    def set_aside(self) -> None:
        """Keep the file under another name, and start an empty log."""
        numbers = itertools.count(1)
        names = (f"{self.path.stem}-old-{number}{self.path.suffix}" for number in numbers)
        free = (path for name in names if not (path := self.path.with_name(name)).exists())
        self.path.rename(next(free))
        self.close()
        self.open()

    def _parsed(self, line: bytes, start: int) -> dict[str, Any]:
        try:
            entry = json.loads(line.decode())
        except ValueError as error:
            raise self._damaged(start) from error
        if not isinstance(entry, dict) or not line.endswith(b"\n"):
            raise self._damaged(start)
        return entry

    def _damaged(self, start: int) -> DatasetError:
        return DatasetError(
            f"{self.path}: is damaged at byte {start}. Put back a copy of the folder from a backup,"
            " or move this file away to go on with the table as it was last saved in full."
        )

    def _size(self) -> int:
        return os.fstat(self._handle).st_size

    def _find_end(self) -> int:
        """Return the position behind the last whole line."""
        end = self._after_newline(self._size())
        start = self._after_newline(end - 1)
        if end > start:
            try:
                self.read(start)
            except DatasetError:  # A crash let the end of the line reach the disk, not its start.
                return start
        return end

    def _after_newline(self, end: int) -> int:
        """Return the position behind the last newline before `end`."""
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            found = os.pread(self._handle, end - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
        return 0


def _write_all(handle: int, content: bytes, position: int) -> None:
    rest = memoryview(content)
    while rest:
        written = os.pwrite(handle, rest, position)
        rest, position = rest[written:], position + written
