"""The rows of the transcript table: what they hold, what they may hold, and how they are shown."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from csm_studio.projects import name_problem

MIN_TRIMMED_S = 0.2
"""Shortest part of a clip that its ends may be trimmed to."""

MAX_SPEAKER = 999_999_999
"""Largest speaker number that every reader of datasets takes (nine digits)."""

_LARGEST_NUMBER = 1e9
_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Row:
    """One clip of the table.

    Attributes:
        id: Its name in the program, never given twice; "" in a row that is yet to be added.
        keep: Whether it goes into the training data.
        text: What is said.
        speaker: Who says it, >= 0.
        duration_s: Length of the working copy.
        audio: File name of the working copy in the dataset's `audio` folder.
        original: File name of the recording it was made from in `originals`, or "".
        source: Where it came from, in words.
        second_text: What a second listener or model heard, or "".
        disagreement: How far the two texts are apart, or None.
        start_s: Where the part that is used starts in the working copy.
        end_s: Where it ends; 0.0 when making a row stands for the end of the clip.
        deleted: Taken out of the table, and still there to be restored.
        reviewed: A person has listened to it.
        conversation: Name shared by the clips of one conversation, or "".
    """

    id: str
    keep: bool
    text: str
    speaker: int
    duration_s: float
    audio: str
    original: str = ""
    source: str = ""
    second_text: str = ""
    disagreement: float | None = None
    start_s: float = 0.0
    end_s: float = 0.0
    deleted: bool = False
    reviewed: bool = False
    conversation: str = ""

    def __post_init__(self) -> None:
        if self.end_s == 0.0:
            object.__setattr__(self, "end_s", self.duration_s)

    @property
    def is_trimmed(self) -> bool:
        """Whether less than the whole working copy is used."""
        return self.start_s > 0.0 or self.end_s < self.duration_s

    @property
    def trimmed_s(self) -> float:
        """Length of the part that is used."""
        return self.end_s - self.start_s


FIELDS = tuple(field.name for field in dataclasses.fields(Row))
_TEXT_FIELDS = frozenset({"text", "source", "second_text", "conversation"})
_FLAG_FIELDS = frozenset({"keep", "deleted", "reviewed"})
_SORT_KEYS = (*FIELDS, "trimmed_s")


def to_record(row: Row) -> dict[str, Any]:
    """Return a row as what JSON can hold."""
    return {name: getattr(row, name) for name in FIELDS}


def changed_fields(row: Row, values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return `[before, after]` of each field that the new values change.

    Raises:
        ValueError: A field is unknown or a value is not allowed, with the reason in plain words.
    """
    changed: dict[str, list[Any]] = {}
    for name, value in values.items():
        if name not in FIELDS or name == "id":
            raise ValueError(f"has no field {name!r} that can be changed")
        before, after = getattr(row, name), _checked_value(name, value)
        if before != after:
            changed[name] = [before, after]
    if "duration_s" in changed and not row.is_trimmed and "end_s" not in values:
        changed["end_s"] = [row.end_s, changed["duration_s"][1]]
    _check_trim(dataclasses.replace(row, **{name: after for name, (_, after) in changed.items()}))
    return changed


def checked_new(row: Row) -> Row:
    """Return a row to be added with its values checked and numbers made floats.

    Raises:
        ValueError: A value is not allowed.
    """
    if not isinstance(row.id, str) or not _ID.fullmatch(row.id):
        raise ValueError(f"the id {row.id!r} is not made of small letters, digits, - and _")
    values = {name: _checked_value(name, getattr(row, name)) for name in FIELDS if name != "id"}
    checked = Row(row.id, **values)
    _check_trim(checked)
    return checked


def select_rows(
    rows: Iterable[Row],
    search: str = "",
    ids: Collection[str] | None = None,
    speaker: int | None = None,
    sort: str | None = None,
    descending: bool = False,
) -> list[Row]:
    """Filter and sort rows for showing.

    Args:
        rows: The rows, in their own order.
        search: Must be in the text or in a file's name; case does not matter.
        ids: The only rows wanted, or None.
        speaker: The only speaker wanted, or None.
        sort: A field of `Row`, or `trimmed_s`; None leaves the order. Empty values come last.
        descending: Sort the other way.

    Raises:
        ValueError: There is no such field to sort by.
    """
    if sort is not None and sort not in _SORT_KEYS:
        raise ValueError(f"cannot be sorted by {sort!r}; choose one of {', '.join(_SORT_KEYS)}")
    wanted, sought = None if ids is None else set(ids), search.strip().casefold()
    found = [
        row
        for row in rows
        if (wanted is None or row.id in wanted)
        and (speaker is None or row.speaker == speaker)
        and (not sought or sought in f"{row.text}\n{row.audio}\n{row.original}".casefold())
    ]
    if sort is None:
        return found[::-1] if descending else found
    keys = {row.id: _sort_key(getattr(row, sort)) for row in found}
    given = [row for row in found if keys[row.id] is not None]
    empty = [row for row in found if keys[row.id] is None]
    return sorted(given, key=lambda row: keys[row.id], reverse=descending) + empty


def replaced_texts(
    rows: Iterable[Row], find: str, replacement: str, match_case: bool, whole_words: bool
) -> dict[str, str]:
    """Return the new text of each row that has `find` in its text.

    Raises:
        ValueError: There is nothing to look for, or the replacement is no text.
    """
    if not isinstance(find, str) or not find:
        raise ValueError("There is nothing to look for. Write what shall be replaced.")
    replacement = _checked_text("replacement", replacement)
    sought = rf"(?<!\w){re.escape(find)}(?!\w)" if whole_words else re.escape(find)
    pattern = re.compile(sought, 0 if match_case else re.IGNORECASE)
    return {
        row.id: pattern.sub(lambda _: replacement, row.text)
        for row in rows
        if pattern.search(row.text)
    }


def _sort_key(value: Any) -> Any:
    if isinstance(value, str):
        return value.casefold() or None
    return value


def _checked_value(name: str, value: Any) -> Any:
    if name in _FLAG_FIELDS:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be yes or no, not {value!r}")
        return value
    if name in _TEXT_FIELDS:
        return _checked_text(name, value)
    if name == "speaker":
        is_number = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= MAX_SPEAKER:
            raise ValueError(f"the speaker must be a whole number from 0, not {value!r}")
        return int(value)
    if name in ("audio", "original"):
        if (problem := name_problem(value)) and (name == "audio" or value != ""):
            raise ValueError(f"{value!r} cannot be the name of its {name} file: {problem}")
        return value
    if name == "disagreement" and value is None:
        return None
    return _checked_number(name, value)


def _checked_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {value!r}")
    if "\0" in value:
        raise ValueError(f"{name} has a NUL character; remove it")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name} has half a character (a lone surrogate); write it again")
    return value


def _checked_number(name: str, value: Any) -> float:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not abs(value) <= _LARGEST_NUMBER:  # NaN is no more than anything.
        raise ValueError(f"{name} must be a number, not {value!r}")
    if name in ("duration_s", "end_s") and value <= 0:
        raise ValueError(f"{name} is {value}; it must be more than 0")
    return float(value)


def _check_trim(row: Row) -> None:
    if row.start_s < 0 or row.end_s > row.duration_s or row.start_s >= row.end_s:
        raise ValueError(
            f"the part from {row.start_s:.2f} s to {row.end_s:.2f} s is not inside the clip of"
            f" {row.duration_s:.2f} s"
        )
    if row.is_trimmed and row.trimmed_s < MIN_TRIMMED_S:
        raise ValueError(
            f"the part from {row.start_s:.2f} s to {row.end_s:.2f} s is shorter than"
            f" {MIN_TRIMMED_S} s; move the ends apart"
        )
