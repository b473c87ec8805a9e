"""The transcript table: edits, views and exports."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csm_studio.audio.io import duration_s, read_audio, write_wav
from csm_studio.constants import SAMPLE_RATE_HZ
from csm_studio.dataset import exports
from csm_studio.dataset.editor import DatasetEditor, Row
from csm_studio.dataset.importers import find_clips
from csm_studio.dataset.records import read_dataset
from csm_studio.errors import AudioError, DatasetError

TEXTS = (
    "Hello there.",
    "It\u2019s \u201cquoted\u201d, isn't it?",
    "Füße, 東京 and 🙂",
    "a,b;c\td",
    "line\nbreak",
    "no",
)


def ramp(length_s: float) -> np.ndarray:
    """Sound whose every sample tells where it is."""
    return (np.arange(round(length_s * SAMPLE_RATE_HZ)) % 30_000 / 32_768).astype(np.float32)


def row(text: str = "Hello.", audio: str = "a.wav", **values: Any) -> Row:
    return Row("", True, text, values.pop("speaker", 0), 2.0, audio, **values)


@pytest.fixture
def editor(tmp_path: Path) -> Iterator[DatasetEditor]:
    with DatasetEditor(tmp_path / "project" / "dataset") as opened:
        for name in "abcdef":
            write_wav(opened.folder / "audio" / f"{name}.wav", ramp(2.0))
        yield opened


@pytest.fixture
def filled(editor: DatasetEditor) -> DatasetEditor:
    """Six clips of three speakers in two conversations and two alone."""
    editor.add(
        row(text, f"{name}.wav", speaker=speaker, conversation=talk, source="take.wav")
        for text, name, speaker, talk in zip(
            TEXTS, "abcdef", (0, 3, 0, 12, 3, 0), ("x", "y", "x", "", "y", ""), strict=True
        )
    )
    return editor


def test_nothing_is_made_before_it_is_opened(tmp_path: Path) -> None:
    editor = DatasetEditor(tmp_path / "new")
    for read in (editor.rows, editor.undo, lambda: editor.revision, lambda: editor.get("c1")):
        with pytest.raises(DatasetError, match="not open"):
            read()
    assert list(tmp_path.iterdir()) == []


def test_rows_get_ids_and_whole_clips(filled: DatasetEditor) -> None:
    rows = filled.rows()
    assert [r.id for r in rows] == ["c1", "c2", "c3", "c4", "c5", "c6"]
    assert {(r.start_s, r.end_s, r.is_trimmed) for r in rows} == {(0.0, 2.0, False)}
    assert filled.get("c2") == rows[1]
    assert filled.can_undo == "Add 6 clips"
    assert filled.audio_path("c2") == filled.folder / "audio" / "b.wav"


def test_each_operation_changes_what_it_says(filled: DatasetEditor) -> None:
    before = filled.get("c1")
    done: list[tuple[int, dict[str, Any]]] = [
        (filled.set_text("c1", "Bye."), {"text": "Bye."}),
        (filled.set_keep("c1", False), {"keep": False}),
        (filled.set_speaker(["c1"], 7), {"speaker": 7}),
        (filled.set_reviewed("c1"), {"reviewed": True}),
        (filled.trim("c1", 0.5, 1.5), {"start_s": 0.5, "end_s": 1.5}),
        (filled.set_second({"c1": ("By", 0.5)}), {"second_text": "By", "disagreement": 0.5}),
        (filled.delete(["c1"]), {"deleted": True}),
    ]
    assert [changed for changed, _ in done] == [1] * 7
    values = {name: value for _, change in done for name, value in change.items()}
    assert filled.get("c1") == dataclasses.replace(before, **values)
    assert filled.get("c1").trimmed_s == 1.0
    assert "c1" not in [r.id for r in filled.rows()]
    assert "c1" in [r.id for r in filled.rows(include_deleted=True)]
    assert filled.restore(["c1", "c2"]) == 1
    assert filled.get("c2") == filled.rows()[1]


def test_what_is_there_already_is_no_edit(filled: DatasetEditor) -> None:
    filled.set_text("c1", "new")
    filled.undo()
    revision = filled.revision
    assert filled.set_text("c1", TEXTS[0]) == 0
    assert filled.set_keep(["c1", "c2"], True) == 0
    assert filled.trim("c1", 0, 2) == 0
    assert filled.apply({}, "nothing") == 0
    assert (filled.revision, filled.can_redo) == (revision, "Edit text")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "a\0b"}, "NUL"),
        ({"text": "\ud83d"}, "lone surrogate"),
        ({"text": 5}, "must be text"),
        ({"second_text": None}, "must be text"),
        ({"speaker": -1}, "whole number"),
        ({"speaker": 1.5}, "whole number"),
        ({"speaker": True}, "whole number"),
        ({"speaker": 10**9}, "whole number"),
        ({"keep": 1}, "yes or no"),
        ({"start_s": -0.1}, "not inside the clip"),
        ({"end_s": 2.1}, "not inside the clip"),
        ({"start_s": 1.5, "end_s": 1.0}, "not inside the clip"),
        ({"start_s": 1.0, "end_s": 1.1}, "shorter than 0.2 s"),
        ({"start_s": 0.0, "end_s": 0.0}, "more than 0"),
        ({"end_s": float("nan")}, "must be a number"),
        ({"end_s": 10**400}, "must be a number"),
        ({"disagreement": "high"}, "must be a number"),
        ({"audio": "../a.wav"}, "dot"),
        ({"audio": ""}, "empty"),
        ({"id": "c9"}, "no field 'id'"),
        ({"colour": "red"}, "no field 'colour'"),
    ],
)
def test_values_that_are_refused_change_nothing(
    filled: DatasetEditor, values: dict[str, Any], message: str
) -> None:
    before = filled.rows()
    with pytest.raises(DatasetError, match=message):
        filled.apply({"c2": {"text": "fine"}, "c1": values}, "Edit")
    assert filled.rows() == before
    assert filled.revision == 1


def test_numbers_of_numpy_are_taken(filled: DatasetEditor) -> None:
    values = {"speaker": np.int64(4), "end_s": np.float32(1.5)}
    filled.apply({"c1": values}, "Edit")
    changed = filled.get("c1")
    assert (type(changed.speaker), type(changed.end_s)) == (int, float)
    assert (changed.speaker, changed.end_s) == (4, 1.5)


def test_a_new_working_copy_brings_its_length(filled: DatasetEditor) -> None:
    filled.apply({"c1": {"duration_s": 1.5, "audio": "b.wav"}}, "Normalise")
    assert (filled.get("c1").end_s, filled.get("c1").is_trimmed) == (1.5, False)
    filled.trim("c2", 0.5, 1.0)
    filled.apply({"c2": {"duration_s": 1.5}}, "Normalise")
    assert (filled.get("c2").start_s, filled.get("c2").end_s) == (0.5, 1.0)
    with pytest.raises(DatasetError, match="not inside"):
        filled.apply({"c2": {"duration_s": 0.8}}, "Normalise")


@pytest.mark.parametrize("name", ["c9", "", "../c1", None, 3, ["c1"]])
def test_rows_that_are_not_there(filled: DatasetEditor, name: Any) -> None:
    for use in (filled.get, filled.audio_path, lambda i: filled.set_text(i, "x")):
        with pytest.raises((DatasetError, TypeError)):
            use(name)
    assert filled.revision == 1


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (row(audio="missing.wav"), "not found"),
        (row(audio="x/../../rows.json"), "slash"),
        (row(audio="out.wav"), "link"),
        (row(original="missing.m4a"), "not found"),
        (row(speaker=-1), "whole number"),
        (row(text="\0"), "NUL"),
        (dataclasses.replace(row(), id="C 1"), "small letters"),
        (dataclasses.replace(row(), id="c1"), "given before"),
        (dataclasses.replace(row(), end_s=3.0), "not inside"),
        (Row("", True, "", 0, 0.0, "a.wav"), "more than 0"),
    ],
)
def test_rows_that_cannot_be_added(filled: DatasetEditor, new: Row, message: str) -> None:
    (filled.folder / "audio" / "out.wav").symlink_to(filled.folder / "journal.jsonl")
    before = filled.rows()
    with pytest.raises(DatasetError, match=message):
        filled.add([row(audio="b.wav"), new])
    assert (filled.rows(), filled.revision) == (before, 1)


def test_a_link_made_later_is_not_followed(filled: DatasetEditor) -> None:
    audio = filled.folder / "audio"
    (audio / "a.wav").unlink()
    (audio / "a.wav").symlink_to(filled.folder / "journal.jsonl")
    with pytest.raises(DatasetError, match="link"):
        filled.audio_path("c1")
    with pytest.raises(DatasetError, match="link"):
        filled.export_dataset(filled.folder / "dataset.json")
    with pytest.raises(DatasetError, match="empty"):
        filled.original_path("c2")


def test_ids_are_never_given_twice(editor: DatasetEditor) -> None:
    assert editor.new_ids(2) == ["c1", "c2"]
    assert [r.id for r in editor.add([row(), row()])] == ["c3", "c4"]
    editor.undo()
    assert editor.rows(include_deleted=True) == []
    editor.add([dataclasses.replace(row(), id="c7")])
    assert editor.new_ids(3) == ["c5", "c6", "c8"]
    editor.undo()
    editor.close()
    editor.open()
    assert [r.id for r in editor.add([row()])] == ["c8"]
    with pytest.raises(DatasetError, match="given before"):
        editor.add([dataclasses.replace(row(), id="c7")])


def test_an_id_given_twice_at_once(editor: DatasetEditor) -> None:
    with pytest.raises(DatasetError, match="x is given twice"):
        editor.add([dataclasses.replace(row(), id="x")] * 2)
    assert editor.rows() == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("the", "a"), ["a a oar", "BaME", "baaa"]),
        (("the", "a", None, True), ["The a oar", "BTHEME", "baaa"]),
        (("the", "a", None, False, True), ["a a oar", "BTHEME", "bathea"]),
        (("the", "a", ["c3"]), ["The the oar", "BTHEME", "baaa"]),
        ((".", "x"), ["The the oar", "BTHEME", "bathea"]),
        (("the", r"\1\g<0>"), [r"\1\g<0> \1\g<0> oar", r"B\1\g<0>ME", r"ba\1\g<0>a"]),
    ],
)
def test_replacing(editor: DatasetEditor, arguments: Any, expected: list[str]) -> None:
    before = ["The the oar", "BTHEME", "bathea"]
    editor.add([row(text) for text in before] + [row("the", deleted=True)])
    num_changed = editor.replace_text(*arguments)
    texts = [r.text for r in editor.rows()]
    assert texts == expected
    assert num_changed == sum(a != b for a, b in zip(before, expected, strict=True))
    assert editor.rows(include_deleted=True)[3].text == "the"
    editor.undo()
    if num_changed:
        assert [r.text for r in editor.rows()] == before


def test_replacing_needs_something_to_look_for(filled: DatasetEditor) -> None:
    with pytest.raises(DatasetError, match="nothing to look for"):
        filled.replace_text("", "x")
    with pytest.raises(DatasetError, match="NUL"):
        filled.replace_text("Hello", "\0")


def test_views(filled: DatasetEditor) -> None:
    filled.apply({"c2": {"disagreement": 0.5}, "c4": {"disagreement": 0.1}}, "Second")
    filled.delete("c6")

    def ids(**arguments: Any) -> list[str]:
        return [r.id for r in filled.view(**arguments)]

    assert ids() == ["c1", "c2", "c3", "c4", "c5"]
    assert ids(include_deleted=True)[-1] == "c6"
    assert ids(search="FÜSSE") == ["c3"]
    assert ids(search="D.wav") == ["c4"]
    assert ids(speaker=3) == ["c2", "c5"]
    assert ids(flagged_ids=["c5", "c1", "c9"]) == ["c1", "c5"]
    assert ids(flagged_ids=[]) == []
    assert ids(sort="speaker") == ["c1", "c3", "c2", "c5", "c4"]
    assert ids(sort="disagreement") == ["c4", "c2", "c1", "c3", "c5"]
    assert ids(sort="disagreement", descending=True) == ["c2", "c4", "c1", "c3", "c5"]
    assert ids(sort="audio", descending=True, speaker=0) == ["c3", "c1"]
    assert ids(descending=True)[0] == "c5"
    with pytest.raises(DatasetError, match="cannot be sorted by 'colour'"):
        ids(sort="colour")


def assert_same(editor: DatasetEditor, clips: Any, durations: Any) -> None:
    """The clips are the kept rows, whatever their order."""
    found = sorted(
        (" ".join(clip.text.split()), clip.speaker_id, round(length, 3))
        for clip, length in zip(clips, durations, strict=True)
    )
    expected = sorted(
        (" ".join(r.text.split()), r.speaker, round(r.trimmed_s, 3)) for r in editor.kept()
    )
    assert found == expected


@pytest.mark.parametrize("form", ["flat", "conversations"])
@pytest.mark.parametrize("copy_audio", [False, True])
def test_an_exported_dataset_reads_back(
    filled: DatasetEditor, tmp_path: Path, form: Any, copy_audio: bool
) -> None:
    filled.trim("c2", 0.25, 1.5)
    filled.set_text("c3", "  blanks around ")
    filled.set_keep("c4", False)
    filled.delete("c6")
    seen: list[tuple[int, int]] = []
    path = filled.export_dataset(
        tmp_path / "out" / "dataset.json", form, copy_audio, lambda *done: seen.append(done)
    )
    dataset = read_dataset(path)
    clips = dataset.clips
    assert_same(filled, clips, [duration_s(clip.audio_path) for clip in clips])
    sizes = [len(turns) for turns in dataset.conversations]
    assert sizes == ([1, 1, 1, 1] if form == "flat" else [2, 2])
    order = [r.text.strip() for r in filled.kept()]
    if form == "flat":
        assert [clip.text for clip in clips] == order
    else:
        assert [clip.text for clip in clips] == [order[i] for i in (0, 2, 1, 3)]
    trimmed = next(clip for clip in clips if clip.text == TEXTS[1])
    np.testing.assert_array_equal(read_audio(trimmed.audio_path), ramp(2.0)[6_000:36_000])
    written = sorted(p.name for p in (path.parent / "dataset_clips").iterdir())
    assert written == (["c1.wav", "c2.wav", "c3.wav", "c5.wav"] if copy_audio else ["c2.wav"])
    assert sorted(p.name for p in path.parent.iterdir()) == ["dataset.json", "dataset_clips"]
    assert seen == [(n, 4) for n in range(1, 5)]


def test_a_second_export_leaves_the_clips_of_the_first(
    filled: DatasetEditor, tmp_path: Path
) -> None:
    filled.trim("c1", 0.0, 1.0)
    path = filled.export_dataset(tmp_path / "dataset.json")
    first = read_dataset(path).clips[0].audio_path
    filled.trim("c1", 0.0, 0.5)
    filled.export_dataset(path)
    assert duration_s(first) == 1.0
    assert duration_s(read_dataset(path).clips[0].audio_path) == 0.5


def test_an_export_within_the_project_moves_with_it(filled: DatasetEditor, tmp_path: Path) -> None:
    filled.trim("c2", 0.5, 1.0)
    path = filled.export_dataset(tmp_path / "project" / "runs" / "r" / "dataset.json")
    assert str(tmp_path) not in path.read_text()
    filled.close()
    shutil.move(tmp_path / "project", tmp_path / "moved")
    clips = read_dataset(tmp_path / "moved" / "runs" / "r" / "dataset.json").clips
    assert [duration_s(clip.audio_path) for clip in clips] == [2.0, 0.5, 2.0, 2.0, 2.0, 2.0]


def test_an_ljspeech_folder_reads_back(filled: DatasetEditor, tmp_path: Path) -> None:
    filled.trim("c2", 0.25, 1.5)
    filled.set_keep("c4", False)
    folder = filled.export_ljspeech(tmp_path / "lj")
    report = find_clips(folder)
    assert_same(filled, report.clips, report.durations_s)
    assert (report.skipped, report.notes, report.speaker_names) == ((), (), {})
    assert report.source == "metadata.csv (LJSpeech table)"
    lines = (folder / "metadata.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "speaker0_c1|Hello there.|Hello there."
    assert lines[3] == "speaker3_c5|line break|line break"
    copied = (folder / "wavs" / "speaker0_c1.wav").read_bytes()
    assert copied == filled.audio_path("c1").read_bytes()


def test_random_texts_and_speakers_read_back(editor: DatasetEditor, tmp_path: Path) -> None:
    draw = random.Random(5)
    letters = "abc  ,;\"'\t\n\\éß東🙂-.0123\u2028\x85"
    for trial in range(5):
        editor.delete([r.id for r in editor.rows()])
        editor.add(
            row("x" + "".join(draw.choices(letters, k=12)), f"{name}.wav", speaker=speaker)
            for name, speaker in zip("abcdef", draw.choices((0, 1, 7, 255), k=6), strict=True)
        )
        for r in draw.sample(editor.rows(), 3):
            start_s = round(draw.uniform(0, 1), 3)
            editor.trim(r.id, start_s, round(draw.uniform(start_s + 0.2, 2.0), 3))
        report = find_clips(editor.export_ljspeech(tmp_path / f"lj{trial}"))
        assert_same(editor, report.clips, report.durations_s)
        clips = read_dataset(editor.export_dataset(tmp_path / f"{trial}.json")).clips
        assert_same(editor, clips, [duration_s(clip.audio_path) for clip in clips])
        assert [clip.text for clip in clips] == [r.text.strip() for r in editor.kept()]


def test_what_a_format_cannot_hold_is_named(filled: DatasetEditor, tmp_path: Path) -> None:
    filled.apply({"c1": {"text": " "}, "c2": {"text": "a | b"}}, "Edit")
    for export in (filled.export_dataset, filled.export_ljspeech):
        with pytest.raises(DatasetError, match=r"a.wav: has no text"):
            export(tmp_path / "out" / "x")
    filled.set_keep("c1", False)
    with pytest.raises(DatasetError, match=r"b.wav: the text has a \|"):
        filled.export_ljspeech(tmp_path / "out" / "x")
    filled.set_text("c2", "a,file,text,b")
    with pytest.raises(DatasetError, match="names of columns"):
        filled.export_ljspeech(tmp_path / "out" / "x")
    filled.set_keep([r.id for r in filled.rows()], False)
    with pytest.raises(DatasetError, match="Keep at least one"):
        filled.export_dataset(tmp_path / "out" / "x")
    with pytest.raises(DatasetError, match="no form"):
        filled.export_dataset(tmp_path / "out" / "x", "other")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_failed_export_leaves_nothing(
    filled: DatasetEditor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.trim("c1", 0.0, 1.0)
    filled.trim("c3", 0.0, 1.0)
    (filled.folder / "audio" / "c.wav").write_bytes(b"no sound")
    out = tmp_path / "out"
    for export in (filled.export_dataset, filled.export_ljspeech):
        with pytest.raises(AudioError):
            export(out / "x")
        assert list(out.iterdir()) == []
    filled.set_keep("c3", False)

    def fail(*_: Any) -> None:
        raise DatasetError("disk full")

    monkeypatch.setattr(exports, "write_dataset", fail)
    with pytest.raises(DatasetError, match="disk full"):
        filled.export_dataset(out / "x.json")
    assert list(out.iterdir()) == []


def test_an_ljspeech_folder_in_use_is_kept(filled: DatasetEditor, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    filled.export_ljspeech(tmp_path / "mine")
    before = (tmp_path / "mine" / "metadata.csv").read_bytes()
    with pytest.raises(DatasetError, match="holds something already"):
        filled.export_ljspeech(tmp_path / "mine")
    assert (tmp_path / "mine" / "metadata.csv").read_bytes() == before


def test_files_hold_no_absolute_path(filled: DatasetEditor, tmp_path: Path) -> None:
    filled.set_text("c1", "new")
    filled.close()
    names = sorted(p.name for p in filled.folder.iterdir())
    assert names == ["audio", "journal.jsonl", "originals", "rows.json"]
    for name in ("journal.jsonl", "rows.json"):
        assert str(tmp_path) not in (filled.folder / name).read_text()
    assert json.loads((filled.folder / "rows.json").read_text())["revision"] == 2
