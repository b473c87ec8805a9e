"""The transcript table: every edit is on disk before it returns, and can be undone."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from csm_studio.dataset.exports import Form, export_dataset, export_ljspeech
from csm_studio.dataset.rows import (
    Row,
    changed_fields,
    checked_new,
    replaced_texts,
    select_rows,
)
from csm_studio.dataset.table_store import TableStore
from csm_studio.errors import DatasetError, WorkspaceError
from csm_studio.projects import resolve_inside, shown

AUDIO = "audio"
ORIGINALS = "originals"

_NUMBERED_ID = re.compile(r"c([1-9][0-9]{0,17})")


class DatasetEditor:
    """A table of clips in a folder. Every method may be called from any thread.

    Methods that change rows raise `DatasetError` if a row is not there, a value is not allowed or
    the change cannot be saved; nothing is changed then.

    Args:
        folder: The dataset's folder. Nothing is made or read before `open`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._lock = threading.RLock()
        self._table = TableStore(self.folder)
        self._next_number = 1

    def open(self) -> DatasetEditor:
        """Read the table, and make the folders of a new one.

        Raises:
            DatasetError: The files are damaged, or another editor has the folder open.
        """
        with self._lock:
            if not self._table.is_open:
                try:
                    for name in (AUDIO, ORIGINALS):
                        (self.folder / name).mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise DatasetError(f"{self.folder}: {error.strerror}.") from error
                self._table.open()
                matches = map(_NUMBERED_ID.fullmatch, self._table.used_ids)
                self._next_number = 1 + max((int(m[1]) for m in matches if m), default=0)
        return self

    def close(self) -> None:
        """Write the snapshot that makes the next opening fast, and let others open the folder."""
        with self._lock:
            self._table.close()

    def __enter__(self) -> DatasetEditor:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def revision(self) -> int:
        """Number of operations so far, undoing and redoing included."""
        with self._lock:
            return self._opened().revision

    @property
    def can_undo(self) -> str | None:
        """Label of the operation that `undo` takes back, or None."""
        with self._lock:
            return self._opened().undo_label

    @property
    def can_redo(self) -> str | None:
        """Label of the operation that `redo` does again, or None."""
        with self._lock:
            return self._opened().redo_label

    def rows(self, include_deleted: bool = False) -> list[Row]:
        """Return the rows in the order they were added."""
        with self._lock:
            rows = self._opened().rows.values()
            return [row for row in rows if include_deleted or not row.deleted]

    def get(self, row_id: str) -> Row:
        """Return a row, deleted or not."""
        with self._lock:
            return self._get(row_id)

    def view(
        self,
        search: str = "",
        flagged_ids: Collection[str] | None = None,
        speaker: int | None = None,
        sort: str | None = None,
        descending: bool = False,
        include_deleted: bool = False,
    ) -> list[Row]:
        """Return rows filtered and sorted for showing; see `rows.select_rows`."""
        rows = self.rows(include_deleted)
        try:
            return select_rows(rows, search, flagged_ids, speaker, sort, descending)
        except ValueError as error:
            raise DatasetError(f"The table {error}.") from error

    def audio_path(self, row_id: str) -> Path:
        """Return where a row's working copy is."""
        return self._file(AUDIO, self.get(row_id).audio)

    def original_path(self, row_id: str) -> Path:
        """Return where the recording is that a row was made from."""
        return self._file(ORIGINALS, self.get(row_id).original)

    def new_ids(self, count: int) -> list[str]:
        """Return ids that no row had before, for naming files before their rows are added."""
        with self._lock:
            used = self._opened().used_ids
            ids: list[str] = []
            while len(ids) < count:
                if (name := f"c{self._next_number}") not in used:
                    ids.append(name)
                self._next_number += 1
            return ids

    def add(self, rows: Iterable[Row], label: str = "") -> list[Row]:
        """Add rows at the end; those with the id "" are given one. Their audio must be there.

        Returns:
            The rows as they were added.
        """
        given = list(rows)
        fresh = iter(self.new_ids(sum(not row.id for row in given)))
        named = [row if row.id else replace(row, id=next(fresh)) for row in given]
        added, problems, seen = [], [], set()
        for row in named:  # Looks at files, so it must not keep other threads waiting.
            try:
                added.append(self._checked(row))
                if row.id in seen:
                    raise ValueError(f"the id {row.id} is given twice")
                seen.add(row.id)
            except (ValueError, DatasetError) as error:
                problems.append(f"{row.source or row.audio or row.id}: {error}")
        with self._lock:
            table = self._opened()
            again = seen & table.used_ids
            problems.extend(f"the id {row_id} was given before" for row_id in sorted(again))
            if problems:
                raise DatasetError("The clips were not added.", problems)
            if added:
                table.commit(label or _counted("Add", len(added)), added=added)
        return added

    def apply(self, changes: Mapping[str, Mapping[str, Any]], label: str) -> int:
        """Change fields of rows, all or none, as one operation to undo.

        Args:
            changes: New values by row and field.
            label: What the operation is called in the menu.

        Returns:
            Number of rows that are different now; if none is, nothing was recorded.
        """
        with self._lock:
            table, found, problems = self._opened(), {}, []
            for row_id, values in changes.items():
                row = self._get(row_id)
                try:
                    if fields := changed_fields(row, values):
                        found[row_id] = fields
                except ValueError as error:
                    problems.append(f"{row.audio}: {error}")
            if problems:
                raise DatasetError("Nothing was changed.", problems)
            if found:
                table.commit(label, changes=found)
            return len(found)

    def set_text(self, row_id: str, text: str) -> int:
        """Set what is said in a clip."""
        return self.apply({row_id: {"text": text}}, "Edit text")

    def set_keep(self, ids: str | Iterable[str], keep: bool) -> int:
        """Take clips into the training data, or leave them out."""
        return self._set(ids, {"keep": keep}, "Keep" if keep else "Leave out")

    def set_speaker(self, ids: str | Iterable[str], speaker: int) -> int:
        """Set who speaks."""
        return self._set(ids, {"speaker": speaker}, f"Set speaker {speaker} for")

    def set_reviewed(self, ids: str | Iterable[str], reviewed: bool = True) -> int:
        """Mark clips as listened to, or not."""
        return self._set(ids, {"reviewed": reviewed}, "Review" if reviewed else "Unreview")

    def set_second(self, results: Mapping[str, tuple[str, float | None]]) -> int:
        """Set the second transcript and the disagreement with it, by row."""
        changes = {
            row_id: {"second_text": text, "disagreement": score}
            for row_id, (text, score) in results.items()
        }
        return self.apply(changes, _counted("Second transcript for", len(changes)))

    def trim(self, row_id: str, start_s: float, end_s: float) -> int:
        """Use only a part of a clip; the working copy is not changed."""
        return self.apply({row_id: {"start_s": start_s, "end_s": end_s}}, "Trim")

    def delete(self, ids: str | Iterable[str]) -> int:
        """Take clips out of the table; their files stay."""
        return self._set(ids, {"deleted": True}, "Delete")

    def restore(self, ids: str | Iterable[str]) -> int:
        """Put deleted clips back."""
        return self._set(ids, {"deleted": False}, "Restore")

    def replace_text(
        self,
        find: str,
        replacement: str,
        ids: Iterable[str] | None = None,
        match_case: bool = False,
        whole_words: bool = False,
    ) -> int:
        """Replace words in the texts, as they are written (no patterns).

        Args:
            find: What to look for.
            replacement: What to put there, perhaps nothing.
            ids: Only these rows; None takes all that are not deleted.
            match_case: Whether capitals matter.
            whole_words: Leave longer words alone that `find` is a part of.

        Returns:
            Number of rows changed.
        """
        with self._lock:
            rows = self.rows() if ids is None else [self._get(row_id) for row_id in _as_list(ids)]
            try:
                texts = replaced_texts(rows, find, replacement, match_case, whole_words)
            except ValueError as error:
                raise DatasetError(str(error)) from error
            changes = {row_id: {"text": text} for row_id, text in texts.items()}
            return self.apply(changes, f"Replace {shown(find)}")

    def undo(self) -> str | None:
        """Take the last operation back and return its label, or None where there is none."""
        with self._lock:
            return self._opened().undo()

    def redo(self) -> str | None:
        """Do again what was taken back last and return its label, or None."""
        with self._lock:
            return self._opened().redo()

    def export_dataset(
        self,
        path: Path | str,
        form: Form = "flat",
        copy_audio: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Write `dataset.json` of the clips to keep; see `exports.export_dataset`."""
        return export_dataset(self.kept(), self.folder, Path(path), form, copy_audio, progress)

    def export_ljspeech(
        self, folder: Path | str, progress: Callable[[int, int], None] | None = None
    ) -> Path:
        """Write an LJSpeech folder of the clips to keep; see `exports.export_ljspeech`."""
        return export_ljspeech(self.kept(), self.folder, Path(folder), progress)

    def kept(self) -> list[Row]:
        """Return the rows that go into the training data."""
        return [row for row in self.rows() if row.keep]

    def _set(self, ids: str | Iterable[str], values: Mapping[str, Any], verb: str) -> int:
        listed = _as_list(ids)
        return self.apply(dict.fromkeys(listed, values), _counted(verb, len(listed)))

    def _opened(self) -> TableStore:
        if not self._table.is_open:
            raise DatasetError(f"{self.folder}: the table is not open. Open it first.")
        return self._table

    def _get(self, row_id: str) -> Row:
        row = self._opened().rows.get(row_id) if isinstance(row_id, str) else None
        if row is None:
            raise DatasetError(f"There is no clip {row_id!r} in the table. Reload the page.")
        return row

    def _checked(self, row: Row) -> Row:
        checked = checked_new(row)
        self._file(AUDIO, checked.audio)
        if checked.original:
            self._file(ORIGINALS, checked.original)
        return checked

    def _file(self, place: str, name: str) -> Path:
        try:
            return resolve_inside(self.folder / place, name, self.folder)
        except WorkspaceError as error:
            raise DatasetError(str(error)) from error


def _as_list(ids: str | Iterable[str]) -> list[str]:
    return [ids] if isinstance(ids, str) else list(ids)


def _counted(verb: str, count: int) -> str:
    return f"{verb} {count} clip{'s' * (count != 1)}"
