"""The dataset file: clips of speech with their text and speaker, read and written as JSON.

Two forms: a flat list of clips, `{"text", "audio_path", "speaker_id"}`, or a list of
conversations, each a list of such clips in the order they were spoken.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csm_studio.errors import DatasetError, OptionError
from csm_studio.files import write_json

_KNOWN_KEYS = frozenset({"text", "audio_path", "speaker_id", "speaker"})
_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true/false",
    type(None): "null",
}


@dataclass(frozen=True)
class Clip:
    """One utterance.

    Attributes:
        text: What is said, without blanks at the ends.
        audio_path: The recording.
        speaker_id: Who says it, >= 0.
    """

    text: str
    audio_path: Path
    speaker_id: int


@dataclass(frozen=True)
class Dataset:
    """Conversations; a flat list of clips is conversations of one clip each.

    Attributes:
        path: The file it was read from, or None.
        conversations: Clips in the order they were spoken.
        notes: What a user should know, though it is no error.
    """

    path: Path | None
    conversations: tuple[tuple[Clip, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def clips(self) -> tuple[Clip, ...]:
        """All clips, conversation by conversation."""
        return tuple(clip for conversation in self.conversations for clip in conversation)


def read_dataset(path: Path | str, max_samples: int | None = None) -> Dataset:
    """Read a dataset file and check every entry. Audio is looked for, not opened.

    Args:
        path: The JSON file. Relative audio paths start at its folder.
        max_samples: Read only this many entries (clips of a flat list, or conversations).

    Returns:
        The dataset, with notes on missing speakers and on keys that are not used.

    Raises:
        DatasetError: The file cannot be read, or entries are wrong: all of them are listed,
            counted from 1.
        OptionError: `max_samples` is less than 1.
    """
    source = Path(path)
    if max_samples is not None and max_samples < 1:
        raise OptionError(f"max_samples is {max_samples}; it must be at least 1.")
    entries = _parse(source)
    if not isinstance(entries, list):
        raise DatasetError(
            f"{source}: holds {_json_name(entries)} where a list of clips or conversations belongs."
        )
    if not entries:
        raise DatasetError(f"{source}: the list is empty. Add at least one clip.")
    reader = _Reader(source.absolute().parent)
    conversations = reader.read(entries[:max_samples])
    if reader.problems:
        count = len(reader.problems)
        raise DatasetError(
            f"{source}: {count} problem{'s' * (count > 1)} (entries are counted from 1). Nothing"
            " was changed; mend the file or remove these entries.",
            reader.problems,
        )
    return Dataset(source, conversations, reader.notes())


def write_dataset(path: Path | str, conversations: Sequence[Sequence[Clip]]) -> None:
    """Write a dataset file atomically: flat if every conversation has one clip.

    Audio paths are written relative to the file's folder where they lie under it, which lets the
    folder be moved, and absolute elsewhere.

    Raises:
        DatasetError: There is nothing to write, or the file cannot be written.
    """
    target = Path(path)
    if not conversations or not all(conversations):
        raise DatasetError(f"{target}: not written, for want of clips.")
    records = [[_record(clip, target) for clip in turns] for turns in conversations]
    flat = all(len(turns) == 1 for turns in records)
    try:
        write_json(target, [turns[0] for turns in records] if flat else records)
    except OSError as error:
        raise DatasetError(
            f"{target}: cannot be written ({error.strerror}). Choose another place."
        ) from error


def is_dataset_file(path: Path) -> bool:
    """Return whether a file has the shape of a dataset, be its entries right or wrong."""
    try:
        entries = _parse(path)
    except DatasetError:
        return False
    if not isinstance(entries, list):
        return False
    turns = [turn for entry in entries for turn in (entry if isinstance(entry, list) else [entry])]
    return all(isinstance(turn, dict) and {"text", "audio_path"} <= turn.keys() for turn in turns)


class _Reader:
    """Turns parsed JSON into clips, and gathers all problems and notes on the way."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_without_speaker = 0
        self._unused_keys: Counter[str] = Counter()
        self.problems: list[str] = []

    def read(self, entries: list[Any]) -> tuple[tuple[Clip, ...], ...]:
        num_lists = sum(isinstance(entry, list) for entry in entries)
        num_clips = sum(isinstance(entry, dict) for entry in entries)
        if num_lists and num_clips:
            self.problems.append(
                f"the file mixes {num_clips} single clips with {num_lists} conversations; put each"
                " single clip into a list of its own, or flatten the conversations"
            )
        conversations = []
        for number, entry in enumerate(entries, start=1):
            if isinstance(entry, list):
                name = f"conversation {number}"
                if not entry:
                    self.problems.append(f"{name}: is empty")
                turns = [self._clip(f"{name}, turn {i}", e) for i, e in enumerate(entry, start=1)]
            else:
                turns = [self._clip(f"entry {number}", entry)]
            conversations.append(tuple(turn for turn in turns if turn is not None))
        return tuple(conversations)

    def notes(self) -> tuple[str, ...]:
        notes = []
        if count := self._num_without_speaker:
            notes.append(f"{count} clip(s) name no speaker_id; they are taken as speaker 0.")
        if self._unused_keys:
            keys = ", ".join(f"{key} ({n})" for key, n in sorted(self._unused_keys.items()))
            notes.append(f"Keys that are not used: {keys}.")
        return tuple(notes)

    def _clip(self, place: str, entry: Any) -> Clip | None:
        if not isinstance(entry, dict):
            self.problems.append(f"{place}: is {_json_name(entry)}, not an object")
            return None
        audio = entry.get("audio_path")
        if isinstance(audio, str) and audio:
            place += f" ({Path(audio).name})"
        self._unused_keys.update(entry.keys() - _KNOWN_KEYS)
        text = _checked_text(entry)
        path = _checked_audio(entry, self._folder)
        speaker = self._speaker(entry)
        found = [value.message for value in (text, path, speaker) if isinstance(value, _Problem)]
        self.problems.extend(f"{place}: {message}" for message in found)
        if isinstance(text, str) and isinstance(path, Path) and isinstance(speaker, int):
            return Clip(text, path, speaker)
        return None

    def _speaker(self, entry: dict[str, Any]) -> int | _Problem:
        given = [(k, entry[k]) for k in ("speaker_id", "speaker") if entry.get(k) is not None]
        if not given:
            self._num_without_speaker += 1
            return 0
        checked = [_checked_speaker(key, value) for key, value in given]
        if isinstance(checked[0], int) and checked[-1] != checked[0]:
            return _Problem("speaker_id and speaker differ; keep one")
        return checked[0]


@dataclass(frozen=True)
class _Problem:
    message: str


def _checked_text(entry: dict[str, Any]) -> str | _Problem:
    if "text" not in entry:
        return _Problem("text is missing")
    text = entry["text"]
    if not isinstance(text, str):
        return _Problem(f"text is {_json_name(text)}, not text")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return _Problem("text has half a character (a lone surrogate); write it again")
    return text.strip() or _Problem("text is empty" if not text else "text is only blanks")


def _checked_audio(entry: dict[str, Any], folder: Path) -> Path | _Problem:
    if "audio_path" not in entry:
        return _Problem("audio_path is missing")
    name = entry["audio_path"]
    if not isinstance(name, str):
        return _Problem(f"audio_path is {_json_name(name)}, not text")
    if not name.strip():
        return _Problem("audio_path is empty")
    path = folder / name
    try:
        if path.is_file():
            return path
        if path.is_dir():
            return _Problem(f"audio_path is a folder ({path})")
    except (OSError, ValueError) as error:
        return _Problem(f"audio_path cannot be looked up ({error})")
    return _Problem(f"audio file not found ({path})")


def _checked_speaker(key: str, value: Any) -> int | _Problem:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value.strip()):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return _Problem(f"{key} is {_shown(value)}, not a whole number")
    return value if value >= 0 else _Problem(f"{key} is {value}; it must be 0 or more")


def _parse(path: Path) -> Any:
    """Return a JSON file's content, or raise DatasetError saying where it is broken."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DatasetError(
            f"{path}: dataset file not found. Check the path, or make one with"
            " `python -m csm_studio.finetune.create_dataset`."
        ) from error
    except IsADirectoryError as error:
        raise DatasetError(f"{path}: is a folder. Give the dataset's JSON file.") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be opened ({error.strerror}).") from error
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: is not UTF-8 text (byte {error.start}). Save it as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        hint = "Mend the file at that place."
        if error.msg == "Extra data" and error.lineno > 1:
            hint = "It looks like one JSON object per line: put them into one list, [ ..., ... ]."
        raise DatasetError(
            f"{path}: is not JSON (line {error.lineno}, column {error.colno}: {error.msg}). {hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: is JSON that cannot be read ({error}).") from error


def _record(clip: Clip, target: Path) -> dict[str, Any]:
    audio, folder = clip.audio_path.absolute(), target.absolute().parent
    if not audio.is_relative_to(folder):
        audio, folder = audio.resolve(), folder.resolve()
    inside = audio.is_relative_to(folder)
    name = audio.relative_to(folder).as_posix() if inside else str(audio)
    return {"text": clip.text, "audio_path": name, "speaker_id": clip.speaker_id}


def _json_name(value: Any) -> str:
    return _JSON_NAMES.get(type(value), "a number")


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (str, bool, float)) else _json_name(value)
