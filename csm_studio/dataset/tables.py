"""Transcript tables: LJSpeech's `metadata.csv`, Hugging Face audio folders, CSV with a header."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from csm_studio.audio.io import AUDIO_SUFFIXES

TABLE_NAMES = ("metadata.csv", "metadata.jsonl")
"""File names that are looked for in a folder, the first first."""

FILE_COLUMNS = ("file_name", "filename", "file", "audio_path", "audio_file", "audio", "path", "wav")
TEXT_COLUMNS = ("normalized_text", "text", "transcription", "transcript", "sentence")
SPEAKER_COLUMNS = ("speaker_id", "speaker", "speaker_name", "spk")
"""Column names in order of preference; case does not matter."""

_AUDIO_FOLDERS = ("", "wavs/", "wav/", "audio/", "clips/")


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        line: Its line number, from 1.
        audio: The audio file's name as written, with or without suffix.
        text: The transcript, perhaps empty.
        speaker: Name or number of the speaker, or "" where the table does not say.
        problem: Why the line cannot be used, or "".
    """

    line: int
    audio: str
    text: str
    speaker: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Table:
    """A table's path, its kind in words, and its rows."""

    path: Path
    kind: str
    rows: tuple[Row, ...]


def read_table(path: Path) -> Table | str:
    """Read a transcript table.

    Args:
        path: A `.jsonl` file, or text with columns split by `,`, tab, `;` or `|`.

    Returns:
        The table, or a sentence saying why the file is none.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"{path.name} is not UTF-8 text (byte {error.start}); save it as UTF-8"
    except OSError as error:
        return f"{path.name} cannot be opened ({error.strerror})"
    if not content.strip():
        return f"{path.name} is empty"
    if path.suffix.lower() == ".jsonl":
        return _read_json_lines(path, content)
    header = content.lstrip().split("\n", 1)[0]
    for delimiter in (",", "\t", ";", "|"):
        if _finds_columns(header.split(delimiter)):
            return _read_columns(path, content, delimiter)
    if "|" in header:
        return _read_ljspeech(path, content)
    return (
        f"{path.name} has neither a column for the file ({', '.join(FILE_COLUMNS)}) with one for"
        f" the text ({', '.join(TEXT_COLUMNS)}), nor lines like id|text|normalized text"
    )


class AudioIndex:
    """Finds the audio file that a table names, with or without its suffix and folder."""

    def __init__(self, folder: Path, audio: Sequence[Path]) -> None:
        """Index the files `audio`, which lie under the table's `folder`."""
        self._folder = folder
        self._by_name: dict[str, Path] = {}
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in audio:
            stem = path.relative_to(folder).with_suffix("").as_posix()
            self._by_name[stem + path.suffix.lower()] = path
            self._by_stem[stem].append(path)

    def find(self, written: str) -> list[Path]:
        """Return the files that a name may mean: none, one, or several that differ by suffix."""
        name = written.replace("\\", "/").removeprefix("./")
        stem, _, suffix = name.rpartition(".")
        for prefix in _AUDIO_FOLDERS:
            if path := self._by_name.get(f"{prefix}{stem}.{suffix.lower()}"):
                return [path]
            if found := self._by_stem.get(prefix + name):
                return found
        elsewhere = self._folder / name
        try:
            is_audio = elsewhere.suffix.lower() in AUDIO_SUFFIXES and elsewhere.is_file()
        except (OSError, ValueError):  # a name that no file can have
            is_audio = False
        return [elsewhere] if is_audio else []


def _read_ljspeech(path: Path, content: str) -> Table:
    rows = []
    for line, written in enumerate(content.split("\n"), start=1):
        if not written.strip():
            continue
        cells = [cell.strip() for cell in written.split("|")]
        if len(cells) < 2:
            rows.append(Row(line, cells[0], "", problem="has no | between id and text"))
        else:
            normalized = cells[2] if len(cells) > 2 else ""
            rows.append(Row(line, cells[0], normalized or cells[1]))
    return Table(path, "LJSpeech table", tuple(rows))


def _read_columns(path: Path, content: str, delimiter: str) -> Table | str:
    # Tables split by | follow LJSpeech, where a quotation mark is only that.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL
    lines = io.StringIO(content.lstrip(), newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    rows: list[Row] = []
    try:
        header = next(reader)
        for cells in reader:
            if len(cells) > len(header):
                problem = f"has more columns than the header; put text with {delimiter} in quotes"
                rows.append(Row(reader.line_num, "", "", problem=problem))
            elif any(cell.strip() for cell in cells):
                rows.append(_row(reader.line_num, dict(zip(header, cells, strict=False))))
    except csv.Error as error:
        return f"{path.name} is broken at line {reader.line_num} ({error})"
    return Table(path, "table with a header", tuple(rows))


def _read_json_lines(path: Path, content: str) -> Table | str:
    rows: list[Row] = []
    recognised = False
    for line, written in enumerate(content.split("\n"), start=1):
        if not written.strip():
            continue
        try:
            record = json.loads(written)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            recognised = recognised or _finds_columns(list(record))
            rows.append(_row(line, record))
        else:
            rows.append(Row(line, "", "", problem="is not a JSON object"))
    if not recognised:
        return (
            f"{path.name} has no line with a key for the file ({', '.join(FILE_COLUMNS)}) and one"
            f" for the text ({', '.join(TEXT_COLUMNS)})"
        )
    return Table(path, "JSON lines", tuple(rows))


def _row(line: int, record: Mapping[str, Any]) -> Row:
    cells = {
        name.strip().strip('"').lower(): " ".join(str(value).split())
        for name, value in record.items()
        if value is not None
    }
    audio = _first(cells, FILE_COLUMNS)
    text, speaker = _first(cells, TEXT_COLUMNS), _first(cells, SPEAKER_COLUMNS)
    return Row(line, audio, text, speaker, problem="" if audio else "names no audio file")


def _first(cells: Mapping[str, str], names: Sequence[str]) -> str:
    return next((cells[name] for name in names if cells.get(name)), "")


def _finds_columns(names: Sequence[str]) -> bool:
    found = {name.strip().strip('"').lower() for name in names}
    return not found.isdisjoint(FILE_COLUMNS) and not found.isdisjoint(TEXT_COLUMNS)
