"""Folders of recordings become datasets; whatever is left out is named with its reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path, PurePath

import numpy as np
import pytest

from csm_studio.audio.io import write_wav
from csm_studio.dataset.importers import ImportReport, find_clips
from csm_studio.dataset.records import read_dataset
from csm_studio.dataset.speakers import assign_speakers, number_speakers
from csm_studio.errors import DatasetError, OptionError
from csm_studio.finetune import create_dataset

REPOSITORY = Path(__file__).resolve().parent.parent


def add(folder: Path, name: str, text: str | None = None, ending: str = ".txt") -> Path:
    """Write 0.1 s of sound as `name`, and its transcript if given."""
    path = folder / name
    wav = path.with_name(path.stem + ".wav.tmp")
    write_wav(wav, np.full(2400, 0.1))
    wav.rename(path)
    if text is not None:
        path.with_name(path.stem + ending).write_text(text, encoding="utf-8")
    return path


def texts(report: ImportReport) -> dict[str, str]:
    return {clip.audio_path.name: clip.text for clip in report.clips}


def speakers(report: ImportReport) -> dict[str, int]:
    return {clip.audio_path.name: clip.speaker_id for clip in report.clips}


def skipped(report: ImportReport) -> dict[str, str]:
    return {path.name: reason for path, reason in report.skipped}


def test_transcript_endings_in_order(tmp_path: Path) -> None:
    for ending in (".lab", ".txt", ".original.txt", ".normalized.txt"):
        add(tmp_path, "a.wav", f"from {ending}", ending)
    add(tmp_path, "b.WAV", "from  .lab\n", ".lab")
    add(tmp_path, "c.wav", "upper", ".TXT")
    add(tmp_path, "d.e.wav", "\ufeffdotted")
    report = find_clips(tmp_path)
    assert texts(report) == {
        "a.wav": "from .normalized.txt",
        "b.WAV": "from .lab",
        "c.wav": "upper",
        "d.e.wav": "dotted",
    }
    assert report.durations_s == pytest.approx([0.1] * 4)
    assert report.skipped == ()
    other = find_clips(tmp_path, transcript_suffix=".original.txt")
    assert texts(other) == {"a.wav": "from .original.txt"}
    with pytest.raises(OptionError):
        find_clips(tmp_path, transcript_suffix="")


def test_everything_unusable_is_skipped_with_a_reason(tmp_path: Path) -> None:
    add(tmp_path, "good.wav", "Good.")
    add(tmp_path, "alone.wav")
    add(tmp_path, "blank.wav", " \n")
    add(tmp_path, "latin.wav").with_suffix(".txt").write_bytes("Gr\u00fc\u00dfe".encode("latin-1"))
    add(tmp_path, "twice.wav", "Twice.")
    add(tmp_path, "twice.flac")
    add(tmp_path, "zero.wav", "Zero.").write_bytes(b"")
    add(tmp_path, "noise.wav", "Noise.").write_bytes(b"This is no audio.")
    cut = add(tmp_path, "cut.wav", "Cut.")
    content = bytearray(cut.read_bytes())
    content[40:44] = (480_000).to_bytes(4, "little")
    cut.write_bytes(content)
    add(tmp_path, "._good.wav", "Hidden.")
    add(tmp_path, ".trash/old.wav", "Hidden.")
    add(tmp_path, "__MACOSX/mac.wav", "Hidden.")
    report = find_clips(tmp_path)
    assert texts(report) == {"good.wav": "Good."}
    reasons = skipped(report)
    expected = {
        "alone.wav": "no transcript",
        "blank.wav": "empty transcript",
        "latin.wav": "not UTF-8",
        "twice.wav": "several audio files",
        "twice.flac": "several audio files",
        "zero.wav": "empty (0 bytes)",
        "noise.wav": "not audio",
        "cut.wav": "cut short",
    }
    assert reasons.keys() == expected.keys()
    assert all(expected[name] in reason for name, reason in reasons.items())
    assert all(str(tmp_path) not in reason for reason in reasons.values())


def test_order_is_sorted_and_max_samples_takes_the_first(tmp_path: Path) -> None:
    for name in ("b/2.wav", "b/1.wav", "a/3.wav"):
        add(tmp_path, name, name)
    seen: list[tuple[int, int]] = []
    report = find_clips(tmp_path, max_samples=2, progress=lambda *done: seen.append(done))
    assert [clip.text for clip in report.clips] == ["a/3.wav", "b/1.wav"]
    assert speakers(report) == {"3.wav": 0, "1.wav": 1}
    assert seen == [(1, 3), (2, 3)]
    assert any("1 more clip" in note for note in report.notes)


def test_ljspeech_table(tmp_path: Path) -> None:
    for name in ("LJ-1.wav", "LJ-2.FLAC", "extra.wav"):
        add(tmp_path / "wavs", name, "not from here")
    add(tmp_path / "wavs", "LJ-3.wav")
    lines = [
        'LJ-1|Dr. "Who|Doctor "Who',
        "LJ-2|Plain.|",
        "LJ-3||",
        "LJ-4|Gone.|Gone.",
        "lonely",
        "LJ-1|x|x",
    ]
    (tmp_path / "metadata.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    report = find_clips(tmp_path)
    assert texts(report) == {"LJ-1.wav": 'Doctor "Who', "LJ-2.FLAC": "Plain."}
    assert {clip.speaker_id for clip in report.clips} == {0}
    assert "LJSpeech" in report.source
    assert skipped(report) == {
        "LJ-1.wav": "named again in metadata.csv",
        "LJ-3.wav": "empty transcript",
        "LJ-4": "named in metadata.csv, but not there",
        "metadata.csv:5": "has no | between id and text",
        "extra.wav": "not named in metadata.csv",
    }
    assert texts(find_clips(tmp_path / "metadata.csv")) == texts(report)
    assert len(find_clips(tmp_path, transcript_suffix=".txt").clips) == 3


def test_header_table_with_speakers(tmp_path: Path) -> None:
    for name in "abcd":
        add(tmp_path, f"clips/{name}.wav")
    rows = ['a.wav,"Hello, you",zoe', "clips/b.wav,Two,adam", "c,Three,zoe", "d,un,quoted,zoe"]
    (tmp_path / "metadata.csv").write_text("\n".join(["File,Transcript,Speaker", *rows]))
    report = find_clips(tmp_path, default_speaker=5)
    assert texts(report) == {"a.wav": "Hello, you", "b.wav": "Two", "c.wav": "Three"}
    assert speakers(report) == {"a.wav": 0, "b.wav": 1, "c.wav": 0}
    assert report.speaker_names == {0: "zoe", 1: "adam"}
    assert "more columns" in skipped(report)["metadata.csv:5"]


def test_hugging_face_folders_with_a_table_each(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in "ab":
            add(tmp_path / split, f"{split}_{name}.wav")
        rows = [
            {"file_name": f"{split}_a.wav", "transcription": f"{split} A", "speaker_id": 7},
            {"file_name": f"{split}_b.wav", "text": f"{split} B"},
        ]
        table = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / split / "metadata.jsonl").write_text(table + "\nbroken\n")
    add(tmp_path / "more", "beside.wav", "beside")
    report = find_clips(tmp_path)
    assert sorted(texts(report).values()) == ["beside", "test A", "test B", "train A", "train B"]
    assert speakers(report)["train_a.wav"] == 7
    assert speakers(report)["train_b.wav"] == 0
    assert sum(path.name == "metadata.jsonl:3" for path, _ in report.skipped) == 2


@pytest.mark.parametrize(
    "content", ["title,artist\na,b\n", 'file,text\na.wav,"never closed\nb.wav,x\n', "", "\x00\xff"]
)
def test_unusable_table_is_noted_and_text_files_serve(tmp_path: Path, content: str) -> None:
    add(tmp_path, "a.wav", "From the text file.")
    (tmp_path / "metadata.csv").write_bytes(content.encode("latin-1"))
    report = find_clips(tmp_path)
    assert texts(report) == {"a.wav": "From the text file."}
    assert any("metadata.csv is not used" in note for note in report.notes)
    with pytest.raises(DatasetError, match=r"metadata\.csv: cannot be used"):
        find_clips(tmp_path / "metadata.csv")


def numbered(*names: str, default: int = 0) -> tuple[list[int], dict[int, str]]:
    return assign_speakers([PurePath(name) for name in names], [""] * len(names), default)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (("a.wav", "b.wav"), [9, 9]),
        (("speaker3_a.wav", "b_SPK12.wav", "speaker_4-x.wav", "loudspeaker5.wav"), [3, 12, 4, 9]),
        (("spk2/a.wav", "spk2/speaker1.wav", "deep/speaker 6/wavs/b.wav"), [2, 1, 6]),
        (("bob/a.wav", "alice/b.wav", "bob/wavs/c.wav"), [1, 0, 1]),
        (("bob/a.wav", "bob/b.wav"), [9, 9]),
        (("wavs/a.wav", "clips/b.wav"), [9, 9]),
        (("train/bob/a.wav", "test/alice/b.wav"), [1, 0]),
        (("bob/a.wav", "alice/b.wav", "top.wav"), [9, 9, 9]),
        (("84/121/a.wav", "85/122/b.wav"), [84, 85]),
        (("7/a.wav",), [7]),
        (("0/a.wav", "alice/b.wav", "bob/c.wav"), [0, 1, 2]),
    ],
)
def test_speaker_from_names_and_folders(paths: tuple[str, ...], expected: list[int]) -> None:
    numbers, names = numbered(*paths, default=9)
    assert numbers == expected
    assert set(names) <= set(numbers)


def test_speaker_names_never_take_a_number_in_use() -> None:
    assert number_speakers(["x", "0", "y", "2.0"], taken=[1]) == {"x": 3, "0": 0, "y": 4, "2.0": 2}
    paths = [PurePath("a.wav"), PurePath("b.wav"), PurePath("speaker1.wav")]
    assert assign_speakers(paths, ["", "zoe", ""], default=0) == ([0, 2, 1], {2: "zoe"})


def test_empty_results_say_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"0 audio file.*\.lab.*metadata\.csv"):
        find_clips(tmp_path)
    for number in range(15):
        add(tmp_path, f"{number:02}.wav")
    with pytest.raises(DatasetError) as caught:
        find_clips(tmp_path)
    assert caught.value.problems[0] == "00.wav: no transcript beside it"
    assert caught.value.problems[-1] == "and 5 more"
    with pytest.raises(DatasetError, match="not found"):
        find_clips(tmp_path / "none")
    with pytest.raises(DatasetError, match="Give the folder"):
        find_clips(tmp_path / "00.wav")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_a_link_to_the_folder_itself_is_followed_once(tmp_path: Path) -> None:
    add(tmp_path, "a.wav", "A.")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    assert len(find_clips(tmp_path).clips) == 1


def test_sample_voice_works_as_input(tmp_path: Path) -> None:
    folder = REPOSITORY / "assets" / "sample_voice"
    report = find_clips(folder)
    assert len(report.clips) == len(list((folder / "wavs").iterdir())) == 61
    assert report.speaker_names == {0: "allison", 1: "librivox"}
    assert report.skipped == ()
    table = (folder / "metadata.csv").read_text(encoding="utf-8")
    assert all(clip.audio_path.name in table for clip in report.clips)
    assert (folder / "LICENSE-NOTICE.txt").is_file()


def run_command(*words: str | Path, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    module = "csm_studio.finetune.create_dataset"
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", module, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )


def test_command_writes_a_dataset_that_can_be_read(tmp_path: Path) -> None:
    for name in ("speaker1_a.wav", "speaker1_b.wav", "speaker2_c.wav"):
        add(tmp_path / "my voice", name, f"Text of {name}.")
    add(tmp_path / "my voice", "lost.wav")
    done = run_command("--audio-dir", "my voice", "--output-json", "data set.json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    dataset = read_dataset(tmp_path / "data set.json")
    assert [clip.speaker_id for clip in dataset.clips] == [1, 1, 2]
    paths = [e["audio_path"] for e in json.loads((tmp_path / "data set.json").read_text())]
    assert paths[0] == "my voice/speaker1_a.wav"
    for expected in (
        "Took 3 clips, 0.0 min",
        "speaker 2: 0.0 min",
        "under 10 min of speaker 1, 2",
        "1 x no transcript beside it: lost.wav",
        "Wrote data set.json.",
        "Next: python -m csm_studio.finetune.finetune_lora --data-path 'data set.json'",
    ):
        assert expected in done.stdout


def test_command_with_wrong_input(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    done = run_command("--audio-dir", tmp_path / "none", "--output-json", target)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "folder not found" in done.stderr
    assert "Traceback" not in done.stderr
    add(tmp_path, "a.wav", " ")
    done = run_command("--audio-dir", tmp_path, "--output-json", target)
    assert done.returncode == 2
    assert "a.wav: empty transcript" in done.stderr
    assert not target.exists()
    done = run_command("--audio-dir", tmp_path, "--output-json", target, "--max-samples", "0")
    assert done.returncode == 2
    assert "--max-samples is 0" in done.stderr
    assert run_command("--audio-dir", tmp_path).returncode == 2


def test_command_replaces_only_datasets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(tmp_path, "a.wav", "A.")
    target = tmp_path / "out.json"
    words = ["--audio-dir", str(tmp_path), "--output-json", str(target)]
    for other in ('{"my": "settings"}', "not json", '[{"name": "x"}]'):
        target.write_text(other)
        with pytest.raises(DatasetError, match="is no dataset"):
            create_dataset.main(words)
        assert target.read_text() == other
    target.unlink()
    create_dataset.main(words)
    assert "Wrote" in capsys.readouterr().out
    create_dataset.main([*words, "--default-speaker", "3"])
    assert "Replaced" in capsys.readouterr().out
    assert read_dataset(target).clips[0].speaker_id == 3
    with pytest.raises(DatasetError, match="is a folder"):
        create_dataset.main([*words[:3], str(tmp_path)])


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, csm_studio.finetune.create_dataset;"
        "print([m for m in ('mlx', 'soundfile', 'audresample', 'pydub', 'tqdm')"
        " if m in sys.modules])"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=REPOSITORY)
    assert done.stdout.decode().strip() == "[]"
    assert time.monotonic() - start < 5
