"""The dataset file: both forms are read, and all its problems are told at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from csm_studio.dataset.records import Clip, is_dataset_file, read_dataset, write_dataset
from csm_studio.errors import DatasetError, OptionError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "wavs").mkdir()
    for name in "abc":
        (tmp_path / "wavs" / f"{name}.wav").write_bytes(b"RIFF")
    return tmp_path


def record(name: str = "a", **changes: Any) -> dict[str, Any]:
    return {"text": f"Text {name}.", "audio_path": f"wavs/{name}.wav", "speaker_id": 1} | changes


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in record().items() if key not in keys}


def write(folder: Path, value: Any, **keywords: Any) -> Path:
    path = folder / "dataset.json"
    path.write_text(json.dumps(value), **{"encoding": "utf-8", **keywords})
    return path


def problems(path: Path) -> tuple[str, ...]:
    with pytest.raises(DatasetError) as caught:
        read_dataset(path)
    assert str(path) in str(caught.value)
    return caught.value.problems


def test_flat_list(folder: Path) -> None:
    dataset = read_dataset(write(folder, [record("a"), record("b", speaker_id="3")]))
    clip_a = Clip("Text a.", folder / "wavs/a.wav", 1)
    clip_b = Clip("Text b.", folder / "wavs/b.wav", 3)
    assert dataset.conversations == ((clip_a,), (clip_b,))
    assert dataset.clips == (clip_a, clip_b)
    assert dataset.notes == ()


def test_conversations(folder: Path) -> None:
    dataset = read_dataset(write(folder, [[record("a"), record("b")], [record("c")]]))
    assert [len(turns) for turns in dataset.conversations] == [2, 1]
    assert [clip.text for clip in dataset.clips] == ["Text a.", "Text b.", "Text c."]


def test_paths_start_at_the_file_and_not_at_the_current_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, [record("a")])
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert read_dataset("../dataset.json").clips[0].audio_path.samefile(folder / "wavs/a.wav")
    (elsewhere / "here.wav").touch()
    write(folder, [record("a", audio_path="here.wav")])
    assert "not found" in problems(path)[0]


def test_speaker_is_accepted_and_a_missing_one_is_noted_once(folder: Path) -> None:
    entries = [without("speaker_id") | {"speaker": 2}, without("speaker_id"), record()]
    entries.append(record(speaker_id=None))
    dataset = read_dataset(write(folder, entries))
    assert [clip.speaker_id for clip in dataset.clips] == [2, 0, 1, 0]
    assert len(dataset.notes) == 1
    assert dataset.notes[0].startswith("2 clip(s)")


def test_unused_keys_are_a_note(folder: Path) -> None:
    dataset = read_dataset(write(folder, [record(mood="glad"), record(mood="sad", take=3)]))
    assert dataset.notes == ("Keys that are not used: mood (2), take (1).",)


def test_byte_order_mark_is_accepted(folder: Path) -> None:
    path = write(folder, [record(text="Gr\u00fc\u00dfe")], encoding="utf-8-sig")
    assert read_dataset(path).clips[0].text == "Gr\u00fc\u00dfe"


def test_max_samples_takes_the_first_entries(folder: Path) -> None:
    path = write(folder, [record("a"), record("b"), record("gone")])
    assert len(read_dataset(path, max_samples=2).clips) == 2
    with pytest.raises(OptionError):
        read_dataset(path, max_samples=0)


def test_ten_kinds_of_damage_give_ten_clear_errors_and_lose_nothing(folder: Path) -> None:
    broken: list[tuple[Any, str]] = [
        ("wavs/a.wav", "is text, not an object"),
        (without("text"), "text is missing"),
        (record(text=""), "text is empty"),
        (record(text=" \n\t"), "text is only blanks"),
        (record(text=7), "text is a number"),
        (without("audio_path"), "audio_path is missing"),
        (record("lost"), "audio file not found"),
        (record(audio_path="wavs"), "is a folder"),
        (record(speaker_id=-1), "speaker_id is -1"),
        (record(speaker_id=True), "speaker_id is true"),
    ]
    entries = [entry for damage, _ in broken for entry in (record("b"), damage)]
    path = write(folder, entries)
    before = path.read_bytes()
    found = problems(path)
    assert len(found) == 10
    for place, (problem, (_, expected)) in enumerate(zip(found, broken, strict=True)):
        assert problem.startswith(f"entry {2 * place + 2}")
        assert expected in problem
    assert found[6].startswith("entry 14 (lost.wav): ")
    assert path.read_bytes() == before
    good = [entry for entry in entries if entry == record("b")]
    assert len(read_dataset(write(folder, good)).clips) == 10


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (record(audio_path=""), "audio_path is empty"),
        (record(audio_path=["a"]), "audio_path is a list"),
        (record(audio_path="x" * 5000), "audio"),
        (record(audio_path="a\0b"), "audio"),
        (record(speaker_id=1.0), "speaker_id is 1.0"),
        (record(speaker_id="alice"), 'speaker_id is "alice"'),
        (record(speaker_id=[1]), "speaker_id is a list"),
        (record(speaker=2), "differ"),
        (record(text="half \ud83d"), "surrogate"),
        (None, "is null"),
        (3, "is a number"),
    ],
)
def test_other_damage(folder: Path, entry: Any, expected: str) -> None:
    (problem,) = problems(write(folder, [record(), entry]))
    assert problem.startswith("entry 2")
    assert expected in problem


def test_one_entry_can_have_several_problems(folder: Path) -> None:
    found = problems(write(folder, [{"text": "", "audio_path": "no.wav", "speaker_id": -2}]))
    assert len(found) == 3


def test_conversation_problems_name_the_turn(folder: Path) -> None:
    found = problems(write(folder, [[record()], [], [record(), record(text=" ")]]))
    assert found == (
        "conversation 2: is empty",
        "conversation 3, turn 2 (a.wav): text is only blanks",
    )


def test_mixed_forms(folder: Path) -> None:
    (found,) = problems(write(folder, [record(), [record()]]))
    assert "mixes 1 single clips with 1 conversations" in found


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not JSON"),
        (b'[\n {"text": "a",]', "line 2, column 15"),
        (b'{"text": "a"}\n{"text": "b"}\n', "one JSON object per line"),
        (b'{"text": "a"}', "an object where a list"),
        (b"null", "null where a list"),
        (b"[]", "the list is empty"),
        ('[{"text": "Gr\u00fc\u00dfe"}]'.encode("latin-1"), "not UTF-8"),
        ("[]".encode("utf-16"), "not UTF-8"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_a_file_that_is_no_list(folder: Path, content: bytes, expected: str) -> None:
    path = folder / "dataset.json"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"dataset\.json: ") as caught:
        read_dataset(path)
    assert expected in str(caught.value)
    assert path.read_bytes() == content
    assert not is_dataset_file(path) or content == b"[]"


def test_missing_file_and_folder(folder: Path) -> None:
    with pytest.raises(DatasetError, match="not found"):
        read_dataset(folder / "none.json")
    with pytest.raises(DatasetError, match="is a folder"):
        read_dataset(folder)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (2, 1)])
def test_write_then_read_gives_the_same(folder: Path, lengths: tuple[int, ...]) -> None:
    clips = iter(Clip(f"T\u00e4xt {n}.", folder / f"wavs/{n}.wav", 4) for n in "abc")
    conversations = tuple(tuple(next(clips) for _ in range(length)) for length in lengths)
    path = folder / "dataset.json"
    write_dataset(path, conversations)
    assert read_dataset(path).conversations == conversations
    first = json.loads(path.read_text(encoding="utf-8"))[0]
    assert isinstance(first, dict) == (set(lengths) == {1})
    assert is_dataset_file(path)


def test_written_folder_can_be_moved(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "wavs").mkdir(parents=True)
    (tmp_path / "far.wav").touch()
    (old / "wavs/a.wav").touch()
    near, far = Clip("a", old / "wavs/a.wav", 0), Clip("b", tmp_path / "far.wav", 0)
    write_dataset(old / "dataset.json", [[near], [far]])
    old.rename(new)
    paths = [clip.audio_path for clip in read_dataset(new / "dataset.json").clips]
    assert paths == [new / "wavs/a.wav", (tmp_path / "far.wav").resolve()]


def test_nothing_is_written_for_want_of_clips(tmp_path: Path) -> None:
    nothing: list[list[list[Clip]]] = [[], [[]]]
    for conversations in nothing:
        with pytest.raises(DatasetError, match="want of clips"):
            write_dataset(tmp_path / "dataset.json", conversations)
    assert list(tmp_path.iterdir()) == []
