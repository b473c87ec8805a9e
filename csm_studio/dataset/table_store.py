"""The transcript table on disk: a journal of every operation, and a snapshot to open it fast.

journal.jsonl   one line per operation; the first line has n = 1
    {"n": 7, "do": "edit", "label": ..., "added": [row, ...]}
    {"n": 8, "do": "edit", "label": ..., "changes": {ID: {FIELD: [before, after]}}}
    {"n": 9, "do": "undo", ...}    what undoing did, in the same terms; "removed": [ID, ...]
rows.json       the rows after operation `revision`, and the history to undo, by journal position
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from csm_studio.dataset.journal import Journal
from csm_studio.dataset.rows import Row, to_record
from csm_studio.errors import DatasetError
from csm_studio.files import write_text

JOURNAL = "journal.jsonl"
SNAPSHOT = "rows.json"

HISTORY_LENGTH = 2_000
"""Operations that can be undone."""

SNAPSHOT_EVERY = 500
"""Operations from one snapshot to the next."""

SNAPSHOT_EVERY_BYTES = 4 << 20
"""Journal from one snapshot to the next; a change of all rows at once makes long lines."""

_FORMAT = 1

Changes = Mapping[str, Mapping[str, list[Any]]]
"""`[before, after]` by row and field."""


class Step(NamedTuple):
    """An operation that can be undone or done again.

    Attributes:
        revision: Its number.
        position: Where its line starts in the journal.
        label: What it is called in the menu.
    """

    revision: int
    position: int
    label: str


class TableStore:
    """Rows by id, in the order they were added, with what it takes to keep them. Not thread-safe.

    Args:
        folder: Where journal and snapshot are. Nothing is made or read before `open`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._clear()
        self._journal = Journal(folder / JOURNAL)

    def _clear(self) -> None:
        self.rows: dict[str, Row] = {}
        self.used_ids: set[str] = set()
        self.revision = 0
        self._undo: deque[Step] = deque(maxlen=HISTORY_LENGTH)
        self._redo: list[Step] = []
        self._encoded: dict[str, str] = {}
        self._last_position = 0
        self._saved_revision = 0
        self._saved_end = 0

    @property
    def is_open(self) -> bool:
        """Whether rows can be read and changed."""
        return self._journal.is_open

    @property
    def undo_label(self) -> str | None:
        """What `undo` would take back, or None."""
        return self._undo[-1].label if self._undo else None

    @property
    def redo_label(self) -> str | None:
        """What `redo` would do again, or None."""
        return self._redo[-1].label if self._redo else None

    def open(self) -> None:
        """Read the snapshot and what the journal has beyond it.

        Raises:
            DatasetError: A file is damaged, or the table is open elsewhere.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._journal.open()
        try:
            self._clear()
            is_covered = self._load_snapshot()
            if not is_covered:
                # Each line is on disk before a snapshot counts it, so lines were lost by other
                # means than a crash. The rows are whole; the way back is not.
                self._journal.set_aside()
                self._undo.clear()
                self._redo.clear()
                self._last_position = self._saved_end = 0
            for position, entry in self._journal.read_from(self._saved_end):
                if entry.get("n") != self.revision + 1:
                    raise DatasetError(
                        f"{self._journal.path}: the line at byte {position} is not operation"
                        f" {self.revision + 1}; {SNAPSHOT} is missing or does not belong to it."
                        " Put the folder back from a backup."
                    )
                self._take(position, entry)
            if not is_covered:
                self._write_snapshot()
        except BaseException:
            self._journal.close()
            raise

    def close(self) -> None:
        """Write a snapshot if anything changed, and close the journal."""
        if self.is_open:
            if self.revision > self._saved_revision:
                self._try_snapshot()
            self._journal.close()

    def commit(self, label: str, added: Iterable[Row] = (), changes: Changes | None = None) -> None:
        """Do an operation and put it on disk."""
        entry: dict[str, Any] = {"do": "edit", "label": label}
        if records := [to_record(row) for row in added]:
            entry["added"] = records
        if changes:
            entry["changes"] = changes
        self._append(entry)

    def undo(self) -> str | None:
        """Take the last operation back and return its label, or None where there is none."""
        if not self._undo:
            return None
        done = self._read_step(self._undo[-1])
        entry: dict[str, Any] = {"do": "undo", "label": self._undo[-1].label}
        if "added" in done:
            entry["removed"] = [record["id"] for record in done["added"]]
        if "changes" in done:
            entry["changes"] = {
                name: {field: [after, before] for field, (before, after) in fields.items()}
                for name, fields in done["changes"].items()
            }
        self._append(entry)
        return entry["label"]

    def redo(self) -> str | None:
        """Do again what was taken back last and return its label, or None."""
        if not self._redo:
            return None
        done = self._read_step(self._redo[-1])
        entry: dict[str, Any] = {"do": "redo", "label": done["label"]}
        entry.update({key: done[key] for key in ("added", "changes") if key in done})
        self._append(entry)
        return done["label"]

    def _read_step(self, step: Step) -> dict[str, Any]:
        entry = self._journal.read(step.position)
        if entry.get("n") != step.revision:
            raise DatasetError(
                f"{self._journal.path}: operation {step.revision} is not at byte {step.position}."
                " Put the folder back from a backup."
            )
        return entry

    def _append(self, entry: dict[str, Any]) -> None:
        entry = {"n": self.revision + 1, **entry}
        self._take(self._journal.append(entry), entry)
        is_long = self._journal.end - self._saved_end >= SNAPSHOT_EVERY_BYTES
        if is_long or self.revision - self._saved_revision >= SNAPSHOT_EVERY:
            self._try_snapshot()

    def _take(self, position: int, entry: Mapping[str, Any]) -> None:
        """Follow a line of the journal in memory."""
        try:
            self._change_rows(entry)
            self._change_history(entry["do"], Step(entry["n"], position, entry["label"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(
                f"{self._journal.path}: the line at byte {position} cannot be followed ({error!r})."
                " It may come from a newer version of the program."
            ) from error
        self.revision = entry["n"]
        self._last_position = position

    def _change_rows(self, entry: Mapping[str, Any]) -> None:
        for record in entry.get("added", ()):
            self._put(Row(**record))
        for name in entry.get("removed", ()):
            del self.rows[name], self._encoded[name]
        for name, fields in entry.get("changes", {}).items():
            values = {field: after for field, (_, after) in fields.items()}
            self._put(dataclasses.replace(self.rows[name], **values))

    def _put(self, row: Row) -> None:
        self.rows[row.id] = row
        self.used_ids.add(row.id)
        # Kept as JSON too: to encode a table of thousands would halt the edit that is due for it.
        self._encoded[row.id] = json.dumps(to_record(row), ensure_ascii=False)

    def _change_history(self, do: Literal["edit", "undo", "redo"], step: Step) -> None:
        if do == "edit":
            self._undo.append(step)
            self._redo.clear()
        elif do == "undo" and self._undo:
            self._redo.append(self._undo.pop())
        elif do == "redo" and self._redo:
            self._undo.append(self._redo.pop())

    def _load_snapshot(self) -> bool:
        """Read the snapshot, if there is one.

        Returns:
            Whether the journal has all that the snapshot has.
        """
        path = self.folder / SNAPSHOT
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["format"] != _FORMAT:
                raise ValueError(f"format {saved['format']}")
            for record in saved["rows"]:
                self._put(Row(**record))
            self.used_ids.update(saved["removed_ids"])
            self.revision = self._saved_revision = saved["revision"]
            self._undo.extend(Step(*step) for step in saved["undo"])
            self._redo.extend(Step(*step) for step in saved["redo"])
            self._saved_end, self._last_position = saved["journal_end"], saved["last_position"]
        except FileNotFoundError:
            return True
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{path}: cannot be read ({error}); it is damaged or of a newer version. Put it"
                f" back from a backup, or move it away to make it again from {JOURNAL}."
            ) from error
        return self._journal.checksum(self._last_position, self._saved_end) == saved["checksum"]

    def _try_snapshot(self) -> None:
        with contextlib.suppress(OSError):  # The journal has it all; the next time may do.
            self._write_snapshot()

    def _write_snapshot(self) -> None:
        head = {
            "format": _FORMAT,
            "revision": self.revision,
            "journal_end": self._journal.end,
            "last_position": self._last_position,
            "checksum": self._journal.checksum(self._last_position, self._journal.end),
            "undo": list(self._undo),
            "redo": self._redo,
            "removed_ids": sorted(self.used_ids - self.rows.keys()),
        }
        rows = ",\n".join(self._encoded[name] for name in self.rows)
        opening = json.dumps(head, ensure_ascii=False)[:-1]
        write_text(self.folder / SNAPSHOT, f'{opening}, "rows": [\n{rows}\n]}}\n')
        self._saved_revision, self._saved_end = self.revision, self._journal.end
