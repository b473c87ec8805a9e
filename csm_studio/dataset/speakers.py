"""Who speaks in a file: from its name, its folders, or a table's column."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath

NEUTRAL_FOLDERS = frozenset(
    {"wavs", "wav", "audio", "audios", "clips", "flac", "mp3", "data"}
    | {"train", "training", "test", "dev", "valid", "validation", "val", "eval"}
)
"""Folder names (lower case) that say nothing about the speaker."""

_NUMBERED = re.compile(r"(?<![a-z])(?:speaker|spk)[ _-]?([0-9]{1,9})(?![0-9])", re.IGNORECASE)
_WHOLE = re.compile(r"([0-9]{1,9})(?:\.0+)?")  # spreadsheets turn 3 into 3.0


def speaker_in_path(relative: PurePath) -> int | None:
    """Return N of `speakerN`, `spkN` or `speaker_N` in a file's name or its nearest folder."""
    for part in (relative.stem, *reversed(relative.parent.parts)):
        if match := _NUMBERED.search(part):
            return int(match[1])
    return None


def speaker_folders(paths: Sequence[PurePath]) -> dict[PurePath, str]:
    """Tell which folder stands for the speaker of each file.

    The folder is the first below the top whose name is not neutral (`NEUTRAL_FOLDERS`). Folders
    count only if every file lies in one, and if their name is a number or there are several.

    Args:
        paths: All files, relative to the top folder.

    Returns:
        Folder name by file; empty or without the files whose folder does not count.
    """
    folders: dict[PurePath, str] = {}
    for path in paths:
        named = [part for part in path.parent.parts if part.lower() not in NEUTRAL_FOLDERS]
        if not named:
            return {}
        folders[path] = named[0]
    if len(set(folders.values())) > 1:
        return folders
    return {path: name for path, name in folders.items() if _WHOLE.fullmatch(name)}


def assign_speakers(
    paths: Sequence[PurePath], given: Sequence[str], default: int
) -> tuple[list[int], dict[int, str]]:
    """Number the speaker of each file.

    Args:
        paths: The files, relative to the top folder, in the order that names shall be numbered.
        given: What a table says of each: a name, a number, or "" for nothing.
        default: The number where neither table, file name nor folder tells the speaker.

    Returns:
        The number for each file, and the name behind each number that was made up here.
    """
    folders = speaker_folders(paths)
    in_path = [speaker_in_path(path) for path in paths]
    labels = [
        label or ("" if number is not None else folders.get(path, ""))
        for path, label, number in zip(paths, given, in_path, strict=True)
    ]
    fixed = [default if number is None else number for number in in_path]
    taken = {number for number, label in zip(fixed, labels, strict=True) if not label}
    # Table names first, in the table's order; then folders, sorted.
    ordered = [*filter(None, given), *sorted(filter(None, labels))]
    by_label = number_speakers(ordered, taken)
    numbers = [
        by_label[label] if label else number for label, number in zip(labels, fixed, strict=True)
    ]
    return numbers, {n: label for label, n in by_label.items() if not _WHOLE.fullmatch(label)}


def number_speakers(labels: Iterable[str], taken: Iterable[int] = ()) -> dict[str, int]:
    """Give each label a speaker number.

    Args:
        labels: Names or numbers, in the order that the names shall be numbered.
        taken: Numbers that names must not get.

    Returns:
        Number by label: whole numbers are kept, names get the smallest numbers still free.
    """
    unique = list(dict.fromkeys(labels))
    numbers = {label: int(match[1]) for label in unique if (match := _WHOLE.fullmatch(label))}
    used = {*numbers.values(), *taken}
    candidate = 0
    for label in unique:
        if label not in numbers:
            while candidate in used:
                candidate += 1
            numbers[label] = candidate
            used.add(candidate)
    return numbers
