"""Find clips in a folder of recordings, by a transcript table or by text files beside the audio."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from csm_studio.audio.io import AUDIO_SUFFIXES, duration_s
from csm_studio.dataset.records import Clip
from csm_studio.dataset.speakers import assign_speakers
from csm_studio.dataset.tables import TABLE_NAMES, AudioIndex, Table, read_table
from csm_studio.errors import AudioError, DatasetError, OptionError

TRANSCRIPT_SUFFIXES = (".normalized.txt", ".original.txt", ".txt", ".lab")
"""What may follow an audio file's stem in the name of its transcript, the first first."""

_MAX_PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class ImportReport:
    """What was taken from a folder, and what was not.

    Attributes:
        clips: The clips taken, sorted by path.
        durations_s: The length of each, from the file's header.
        skipped: Path and reason of each file not taken, sorted by path; a table's line that names
            no file is `metadata.csv:LINE`.
        source: Where the transcripts came from, in words.
        speaker_names: The name behind a speaker's number, where it was not a number already.
        notes: What else a user should know.
    """

    clips: tuple[Clip, ...]
    durations_s: tuple[float, ...]
    skipped: tuple[tuple[Path, str], ...]
    source: str
    speaker_names: dict[int, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Candidate:
    audio: Path
    text: str
    speaker: str = ""


def find_clips(
    audio_dir: Path | str,
    default_speaker: int = 0,
    transcript_suffix: str | None = None,
    max_samples: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Pair the audio files below a folder with their transcripts and speakers.

    A folder's `metadata.csv` or `metadata.jsonl` speaks for all audio below it; elsewhere each
    audio file NAME.wav needs a NAME.normalized.txt, NAME.original.txt, NAME.txt or NAME.lab. The
    speaker is the table's, else the number in a file or folder name like `speaker3`, else the
    sub-folder (see `speakers.speaker_folders`), else `default_speaker`.

    Args:
        audio_dir: A folder, searched with its sub-folders, or a table file.
        default_speaker: Number of the speaker where nothing tells it.
        transcript_suffix: Ending of the transcripts, such as `.asr.txt`; tables are then ignored.
        max_samples: Take only the first clips, in the order of their paths.
        progress: Called with (files looked into, files to look into).

    Returns:
        The clips taken, and the reason for each file not taken.

    Raises:
        DatasetError: Nothing is at `audio_dir`, or no clip can be taken from it.
        OptionError: `max_samples` is less than 1.
    """
    if max_samples is not None and max_samples < 1:
        raise OptionError(f"max_samples is {max_samples}; it must be at least 1.")
    if transcript_suffix == "":
        raise OptionError("transcript_suffix is empty; give an ending such as .txt.")
    root, given_table = _root(Path(audio_dir))
    finder = _Finder(root, transcript_suffix)
    found = finder.find(given_table)
    numbers, names = assign_speakers(
        [_relative(candidate.audio, root) for candidate in found],
        [candidate.speaker for candidate in found],
        default_speaker,
    )
    candidates = [
        Clip(candidate.text, candidate.audio, number)
        for candidate, number in zip(found, numbers, strict=True)
    ]
    candidates.sort(key=lambda clip: clip.audio_path.parts)
    clips, durations = _take(candidates, finder, max_samples, progress)
    skipped = tuple(sorted(finder.skipped, key=lambda item: (item[0].parts, item[1])))
    if not clips:
        raise _nothing_found(root, finder, skipped)
    used = {clip.speaker_id for clip in clips}
    names = {number: name for number, name in names.items() if number in used}
    return ImportReport(clips, durations, skipped, finder.source, names, tuple(finder.notes))


def _read_transcript(path: Path) -> str:
    """Return a text file's words, with single blanks between them."""
    try:
        return " ".join(path.read_bytes().decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise DatasetError("the transcript is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise DatasetError(f"the transcript cannot be opened ({error.strerror})") from error


class _Finder:
    """Gathers candidates, and remembers why the rest was left."""

    def __init__(self, root: Path, transcript_suffix: str | None) -> None:
        self._root = root
        self._suffixes = TRANSCRIPT_SUFFIXES if transcript_suffix is None else (transcript_suffix,)
        self._use_tables = transcript_suffix is None
        self._kinds: Counter[str] = Counter()
        self.num_audio = 0
        self.skipped: list[tuple[Path, str]] = []
        self.notes: list[str] = []
        self._used: set[Path] = set()

    @property
    def source(self) -> str:
        return " and ".join(self._kinds) or "nothing"

    @property
    def looked_for(self) -> str:
        endings = ", ".join(f"NAME{suffix}" for suffix in self._suffixes)
        return endings + (f", or {' or '.join(TABLE_NAMES)}" if self._use_tables else "")

    def find(self, given_table: Path | None) -> list[_Candidate]:
        """Return the candidates, those of a table in its order."""
        found: list[_Candidate] = []
        folders = _walk(self._root)
        audio = {f: [p for p in files if _is_audio(p)] for f, files in folders.items()}
        self.num_audio = sum(map(len, audio.values()))
        tables = self._tables(folders, given_table)
        below: dict[Path, list[Path]] = defaultdict(list)
        for folder, files in folders.items():
            owner = next((p for p in (folder, *folder.parents) if p in tables), None)
            if owner is not None:
                below[owner].extend(audio[folder])
            else:
                found.extend(self._pair(files, audio[folder]))
        for folder, table in tables.items():
            found.extend(self._rows(table, folder, below[folder]))
        return found

    def _tables(
        self, folders: dict[Path, list[Path]], given_table: Path | None
    ) -> dict[Path, Table]:
        tables: dict[Path, Table] = {}
        if given_table is not None:
            table = read_table(given_table)
            if isinstance(table, str):
                raise DatasetError(f"{given_table}: cannot be used: {table}.")
            return {self._root: self._counted(table)}
        for folder, files in folders.items():
            by_name = {path.name.lower(): path for path in files}
            found = [by_name[name] for name in TABLE_NAMES if name in by_name]
            if found and not self._use_tables:
                self.notes.append(f"{found[0]} is ignored: a transcript suffix was given.")
                continue
            for path in found:
                table = read_table(path)
                if isinstance(table, str):
                    self.notes.append(f"{path} is not used: {table}.")
                elif folder in tables:
                    self.notes.append(
                        f"{path} is not used: {tables[folder].path.name} comes first."
                    )
                else:
                    tables[folder] = self._counted(table)
        return tables

    def _counted(self, table: Table) -> Table:
        self._kinds[f"{table.path.name} ({table.kind})"] += 1
        return table

    def _rows(self, table: Table, folder: Path, audio: list[Path]) -> Iterator[_Candidate]:
        index = AudioIndex(folder, audio)
        name = table.path.name
        for row in table.rows:
            if row.problem:
                self.skipped.append((table.path.with_name(f"{name}:{row.line}"), row.problem))
                continue
            found = index.find(row.audio)
            path = found[0] if len(found) == 1 else folder / row.audio
            if not found:
                reason = f"named in {name}, but not there"
            elif len(found) > 1:
                reason = "several audio files share this name; keep one"
            elif path in self._used:
                reason = f"named again in {name}"
            else:
                reason = "" if row.text else "empty transcript"
            self._used.update(found)
            if reason:
                self.skipped.append((path, reason))
            else:
                yield _Candidate(path, row.text, row.speaker)
        missing = [path for path in audio if path not in self._used]
        self.skipped.extend((path, f"not named in {name}") for path in missing)

    def _pair(self, files: list[Path], audio: list[Path]) -> Iterator[_Candidate]:
        transcripts = {
            (path.name[: -len(suffix)], suffix): path
            for path in files
            for suffix in self._suffixes
            if path.name.lower().endswith(suffix.lower())
        }
        num_of_stem = Counter(path.stem for path in audio)
        for path in audio:
            beside = [transcripts.get((path.stem, suffix)) for suffix in self._suffixes]
            transcript = next((found for found in beside if found is not None), None)
            reason, text = "", ""
            if transcript is None:
                reason = "no transcript beside it"
            elif num_of_stem[path.stem] > 1:
                reason = "several audio files share this name; keep one"
            else:
                try:
                    text = _read_transcript(transcript)
                    reason = "" if text else "empty transcript"
                except DatasetError as error:
                    reason = str(error)
            if reason:
                self.skipped.append((path, reason))
            else:
                self._kinds["text files beside the audio"] += 1
                yield _Candidate(path, text)


def _take(
    candidates: Sequence[Clip],
    finder: _Finder,
    max_samples: int | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[tuple[Clip, ...], tuple[float, ...]]:
    clips: list[Clip] = []
    durations: list[float] = []
    for done, clip in enumerate(candidates):
        if len(clips) == max_samples:
            left = len(candidates) - done
            finder.notes.append(
                f"{left} more clip(s) were not looked into: {max_samples} asked for."
            )
            break
        try:
            durations.append(duration_s(clip.audio_path))
            clips.append(clip)
        except AudioError as error:
            reason = str(error).removeprefix(f"{clip.audio_path}: ")
            finder.skipped.append((clip.audio_path, reason))
        if progress is not None:
            progress(done + 1, len(candidates))
    return tuple(clips), tuple(durations)


def _root(path: Path) -> tuple[Path, Path | None]:
    """Return the folder to search and, where a table file was given, the table."""
    if path.parts[:1] == ("~",):
        path = path.expanduser()
    if path.is_dir():
        return path.absolute(), None
    if not path.is_file():
        raise DatasetError(f"{path}: folder not found. Check the path.")
    if _is_audio(path):
        raise DatasetError(f"{path}: is one audio file. Give the folder that holds it.")
    return path.absolute().parent, path.absolute()


def _walk(root: Path) -> dict[Path, list[Path]]:
    """Return the files of each folder, sorted, without hidden ones; links are followed once."""
    folders: dict[Path, list[Path]] = {}
    seen: set[Path] = set()
    for name, below, files in os.walk(root, followlinks=True):
        folder = Path(name)
        if folder.resolve() in seen:
            below.clear()
            continue
        seen.add(folder.resolve())
        below[:] = sorted(n for n in below if not n.startswith(".") and n != "__MACOSX")
        folders[folder] = [folder / file for file in sorted(files) if not file.startswith(".")]
    return folders


def _is_audio(path: Path) -> bool:
    return path.suffix.lower() in AUDIO_SUFFIXES


def _relative(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else Path(path.name)


def _nothing_found(
    root: Path, finder: _Finder, skipped: Sequence[tuple[Path, str]]
) -> DatasetError:
    problems = [f"{_relative(path, root)}: {reason}" for path, reason in skipped]
    if len(problems) > _MAX_PROBLEMS_SHOWN:
        more = len(problems) - _MAX_PROBLEMS_SHOWN
        problems = [*problems[:_MAX_PROBLEMS_SHOWN], f"and {more} more"]
    return DatasetError(
        f"{root}: no usable clip found. {finder.num_audio} audio file(s) are there; each needs its"
        f" transcript in {finder.looked_for}.",
        [*finder.notes, *problems],
    )
