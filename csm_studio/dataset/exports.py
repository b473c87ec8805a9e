"""Write the clips of a table for training or for other programs: dataset file, LJSpeech folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from csm_studio.audio.io import read_audio, write_wav
from csm_studio.constants import SAMPLE_RATE_HZ
from csm_studio.dataset.records import Clip, write_dataset
from csm_studio.dataset.rows import Row
from csm_studio.dataset.tables import read_table
from csm_studio.errors import DatasetError, WorkspaceError
from csm_studio.projects import resolve_inside

Form = Literal["flat", "conversations"]
"""A list of clips, or a list of conversations."""

Progress = Callable[[int, int], None]
"""Called with (clips done, clips in all)."""


def export_dataset(
    rows: Sequence[Row],
    dataset: Path,
    path: Path,
    form: Form = "flat",
    copy_audio: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a dataset file. Clips stay where they are, but trimmed ones are written beside it.

    Args:
        rows: The clips.
        dataset: The folder whose `audio` holds them.
        path: The JSON file to write; an older one is replaced, the audio it names is kept.
        form: `conversations` joins clips of the same `conversation`, in the order of the table.
        copy_audio: Write every clip beside the file, to be taken to another place.
        progress: Called after each clip.

    Returns:
        The file's path.

    Raises:
        DatasetError: A clip has no text or no audio file, there are none, or writing fails.
        AudioError: A clip that is trimmed cannot be read.
    """
    if form not in ("flat", "conversations"):
        raise DatasetError(f"{form!r} is no form of a dataset. Use flat or conversations.")
    path = path.absolute()
    sources = _checked_sources(rows, dataset, path)
    folder = _free_name(path.with_name(f"{path.stem}_clips"))
    with _all_or_nothing(folder) as temporary:
        clips: dict[str, Clip] = {}
        for done, (row, source) in enumerate(zip(rows, sources, strict=True), start=1):
            audio = _relative_in_project(source, dataset, path)
            if copy_audio or row.is_trimmed:
                name = f"{row.id}.wav"
                _write_clip(row, source, temporary / name)
                audio = folder / name
            clips[row.id] = Clip(row.text.strip(), audio, row.speaker)
            if progress is not None:
                progress(done, len(rows))
    try:
        write_dataset(path, _conversations(rows, clips, form))
    except DatasetError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return path


def export_ljspeech(
    rows: Sequence[Row], dataset: Path, folder: Path, progress: Progress | None = None
) -> Path:
    """Write a folder with `metadata.csv` (id|text|text) and `wavs/`, as LJSpeech has it.

    The format has no column for speakers: ids start with `speakerN_`, which `find_clips` reads.
    Blanks and line ends within a text become single blanks.

    Args:
        rows: The clips.
        dataset: The folder whose `audio` holds them.
        folder: A folder that is new or empty.
        progress: Called after each clip.

    Returns:
        The folder.

    Raises:
        DatasetError: A text is empty or has what the format cannot hold, a clip has no audio file,
            the folder holds something already, or writing fails.
        AudioError: A clip cannot be read.
    """
    folder = folder.absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DatasetError(f"{folder}: holds something already. Choose a new folder.")
    sources = _checked_sources(rows, dataset, folder)
    barred = [f"{row.audio}: the text has a |; replace it" for row in rows if "|" in row.text]
    if barred:
        raise DatasetError(f"{folder}: not written, for | parts the columns there.", barred)
    texts = [" ".join(row.text.split()) for row in rows]
    with _all_or_nothing(folder) as temporary:
        (temporary / "wavs").mkdir()
        lines = []
        for done, (row, source, text) in enumerate(zip(rows, sources, texts, strict=True), 1):
            name = f"speaker{row.speaker}_{row.id}"
            _write_clip(row, source, temporary / "wavs" / f"{name}.wav")
            lines.append(f"{name}|{text}|{text}\n")
            if progress is not None:
                progress(done, len(rows))
        table_path = temporary / "metadata.csv"
        table_path.write_text("".join(lines), encoding="utf-8", newline="\n")
        table = read_table(table_path)
        if isinstance(table, str) or [row.text for row in table.rows] != texts:
            raise DatasetError(
                f"{folder}: not written: the first text, {texts[0]!r}, would be taken for names of"
                " columns. Change it, or put another clip first."
            )
    return folder


def _checked_sources(rows: Sequence[Row], dataset: Path, target: Path) -> list[Path]:
    """Return each row's audio file, or raise an error that names all rows that lack something."""
    if not rows:
        raise DatasetError(f"{target}: not written, for want of clips. Keep at least one.")
    sources, problems = [], []
    for row in rows:
        try:
            sources.append(resolve_inside(dataset / "audio", row.audio, dataset))
        except WorkspaceError as error:
            problems.append(str(error))
        if not row.text.strip():
            problems.append(f"{row.audio}: has no text; write it, or leave the clip out")
    if problems:
        raise DatasetError(f"{target}: not written.", problems)
    return sources


def _relative_in_project(source: Path, dataset: Path, path: Path) -> Path:
    """Return a path that is written as relative to the file, if both are in the same project.

    A project can be moved. `write_dataset` keeps a path that starts with the file's folder
    relative, and `..` after it.
    """
    project = dataset.resolve().parent
    if not path.parent.resolve().is_relative_to(project):
        return source
    return path.parent / os.path.relpath(source.resolve(), path.parent.resolve())


def _write_clip(row: Row, source: Path, target: Path) -> None:
    """Write the part of a clip that is used; a whole WAV file is copied as it is."""
    if row.is_trimmed or source.suffix.lower() != ".wav":
        start, end = round(row.start_s * SAMPLE_RATE_HZ), round(row.end_s * SAMPLE_RATE_HZ)
        write_wav(target, read_audio(source)[start:end])
    else:
        shutil.copyfile(source, target)


def _conversations(rows: Sequence[Row], clips: dict[str, Clip], form: Form) -> list[list[Clip]]:
    if form == "flat":
        return [[clip] for clip in clips.values()]
    turns: dict[str, list[Clip]] = {}
    for row in rows:
        # Names are told apart from ids by their first letter, for either may be anything.
        key = f"name {row.conversation}" if row.conversation else f"id {row.id}"
        turns.setdefault(key, []).append(clips[row.id])
    return list(turns.values())


@contextlib.contextmanager
def _all_or_nothing(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, which takes its name if the block succeeds.

    One that stays empty is dropped.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        temporary.chmod(folder.parent.stat().st_mode & 0o777)
        yield temporary
        if any(temporary.iterdir()):
            temporary.rename(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _cannot_write(folder: Path, error: OSError) -> DatasetError:
    return DatasetError(f"{folder}: cannot be written ({error.strerror}). Choose another place.")


def _free_name(folder: Path) -> Path:
    """Return a folder name that is free, so that an older export keeps its clips."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}_{number}")
    return free
