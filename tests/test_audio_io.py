"""Any format comes in as 24 kHz mono of the right length, loudness and pitch, or as an error."""

from __future__ import annotations

import subprocess
import sys
import wave
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile

from csm_studio.audio import io
from csm_studio.audio.io import duration_s, read_audio, write_wav
from csm_studio.constants import SAMPLE_RATE_HZ
from csm_studio.errors import AudioError

TONE_HZ = 440.0
LENGTH_S = 1.0
AMPLITUDE = 0.5
CODEC_DELAY_S = 0.1  # lossy containers may keep the encoder's padding


def tone(rate_hz: int, length_s: float = LENGTH_S) -> np.ndarray:
    t = np.arange(round(rate_hz * length_s)) / rate_hz
    return (AMPLITUDE * np.sin(2 * np.pi * TONE_HZ * t)).astype(np.float32)


def assert_is_tone(audio: np.ndarray, slack_s: float, level: float = AMPLITUDE) -> None:
    assert audio.dtype == np.float32
    assert audio.ndim == 1
    assert abs(audio.size / SAMPLE_RATE_HZ - LENGTH_S) <= slack_s + 1 / SAMPLE_RATE_HZ
    middle = audio[audio.size // 4 : audio.size * 3 // 4].astype(np.float64)
    padded = np.fft.rfft(middle * np.hanning(middle.size), 1 << 18)
    pitch_hz = np.argmax(np.abs(padded)) * SAMPLE_RATE_HZ / (1 << 18)
    assert pitch_hz == pytest.approx(TONE_HZ, abs=0.5)
    assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(level, rel=0.05)


@pytest.mark.parametrize(
    ("name", "rate_hz", "subtype"),
    [
        ("a.wav", 24_000, "PCM_16"),
        ("a.wav", 44_100, "PCM_24"),
        ("a.wav", 48_000, "FLOAT"),
        ("a.wav", 8_000, "ULAW"),
        ("a.wav", 22_050, "DOUBLE"),
        ("a.flac", 16_000, "PCM_16"),
        ("a.ogg", 32_000, "VORBIS"),
        ("a.opus", 48_000, "OPUS"),
        ("a.mp3", 44_100, "MPEG_LAYER_III"),
        ("a.aiff", 11_025, "PCM_16"),
        ("a.caf", 96_000, "PCM_32"),
    ],
)
def test_libsndfile_formats(tmp_path: Path, name: str, rate_hz: int, subtype: str) -> None:
    path = tmp_path / name
    container = "OGG" if name.endswith("opus") else None
    soundfile.write(path, tone(rate_hz), rate_hz, subtype=subtype, format=container)
    slack_s = CODEC_DELAY_S if name.endswith(("mp3", "ogg", "opus")) else 0.0
    assert_is_tone(read_audio(path), slack_s)
    assert duration_s(path) == pytest.approx(LENGTH_S, abs=slack_s + 1e-6)


def test_8_bit_wav(tmp_path: Path) -> None:
    path = tmp_path / "old.WAV"
    soundfile.write(path, tone(16_000), 16_000, subtype="PCM_U8")
    assert_is_tone(read_audio(str(path)), 0.0)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left = tone(44_100)
    soundfile.write(tmp_path / "half.wav", np.stack([left, 0 * left], axis=1), 44_100)
    soundfile.write(tmp_path / "none.wav", np.stack([left, -left], axis=1), 44_100)
    assert_is_tone(read_audio(tmp_path / "half.wav"), 0.0, AMPLITUDE / 2)
    assert np.abs(read_audio(tmp_path / "none.wav")).max() < 1e-3


def encode_with_ffmpeg(source: Path, target: Path, *options: str) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", str(source)]
    done = subprocess.run([*command, *options, str(target)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"this ffmpeg cannot write {target.name}: {done.stderr[-200:]!r}")


@pytest.mark.parametrize(
    "name", ["a.m4a", "a.mp4", "a.aac", "a.webm", "a.wma", "a.mka", "a.ac3", "a.tta", "a.wv"]
)
def test_ffmpeg_formats(tmp_path: Path, name: str) -> None:
    source, target = tmp_path / "tone.wav", tmp_path / name
    soundfile.write(source, np.stack([tone(44_100)] * 2, axis=1), 44_100)
    encode_with_ffmpeg(source, target)
    assert_is_tone(read_audio(target), CODEC_DELAY_S)
    assert duration_s(target) == pytest.approx(LENGTH_S, abs=CODEC_DELAY_S)


def test_bundled_ffmpeg_serves_without_a_system_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "tone.wav", tmp_path / "a.m4a"
    soundfile.write(source, tone(24_000), 24_000)
    encode_with_ffmpeg(source, target)
    bundled = imageio_ffmpeg.get_ffmpeg_exe()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", bundled)
    assert_is_tone(read_audio(target), CODEC_DELAY_S)


def test_no_ffmpeg_at_all_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.m4a").write_bytes(b"whatever")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(AudioError, match=r"a\.m4a: .*pip install imageio-ffmpeg"):
        read_audio(tmp_path / "a.m4a")


def test_mp3_without_frame_count_is_read_whole(tmp_path: Path) -> None:
    # libsndfile takes the length from the first frame's bit rate: a dear start hides the rest.
    source = tmp_path / "tone.wav"
    soundfile.write(source, tone(24_000), 24_000)
    for name, rate in (("high.mp3", "160k"), ("low.mp3", "16k")):
        encode_with_ffmpeg(source, tmp_path / name, "-b:a", rate, "-write_xing", "0")
    high, low = (tmp_path / name for name in ("high.mp3", "low.mp3"))
    both = tmp_path / "both.mp3"
    both.write_bytes(high.read_bytes() + low.read_bytes())
    assert soundfile.info(both).duration < 1.5 * LENGTH_S
    expected_s = duration_s(high) + duration_s(low)
    assert read_audio(both).size / SAMPLE_RATE_HZ == pytest.approx(expected_s, abs=CODEC_DELAY_S)


def test_flac_of_unknown_length_is_read_whole(tmp_path: Path) -> None:
    source, piped = tmp_path / "tone.wav", tmp_path / "piped.flac"
    soundfile.write(source, tone(24_000), 24_000)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(source), "-f", "flac", "-"]
    piped.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
    assert_is_tone(read_audio(piped), 0.0)


def test_content_decides_not_the_suffix(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", tone(24_000), 24_000)
    (tmp_path / "a.flac").rename(tmp_path / "a.m4a")
    assert_is_tone(read_audio(tmp_path / "a.m4a"), 0.0)


def damaged(folder: Path) -> dict[str, str]:
    """Write one file of each damage; return what its error must say."""
    good = folder / "good.wav"
    soundfile.write(good, tone(24_000), 24_000)
    soundfile.write(folder / "good.flac", tone(24_000), 24_000)
    (folder / "empty.wav").touch()
    soundfile.write(folder / "nothing.wav", np.zeros(0, np.float32), 24_000)
    (folder / "note.wav").write_text("Hello, this is a text.")
    (folder / "page.m4a").write_text("<html></html>")
    (folder / "cut.wav").write_bytes(good.read_bytes()[:20_000])
    flac = (folder / "good.flac").read_bytes()
    (folder / "cut.flac").write_bytes(flac[: len(flac) // 2])
    for name, value in (("nan.wav", np.nan), ("inf.wav", np.inf)):
        broken = tone(24_000)
        broken[12_000] = value
        soundfile.write(folder / name, broken, 24_000, subtype="FLOAT")
    (folder / "folder.wav").mkdir()
    return {
        "gone.wav": "not found",
        "empty.wav": "empty",
        "nothing.wav": "0 samples",
        "note.wav": "not audio",
        "page.m4a": "not audio",
        "cut.wav": "cut short",
        "cut.flac": "cut short",
        "nan.wav": "0.50 s",
        "inf.wav": "0.50 s",
        "folder.wav": "folder",
        "nul\0.wav": "cannot be opened",
    }


def test_every_damage_is_an_audio_error_with_name_and_problem(tmp_path: Path) -> None:
    for name, problem in damaged(tmp_path).items():
        with pytest.raises(AudioError) as caught:
            read_audio(tmp_path / name)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / name}: "), message
        assert problem in message
        assert message.endswith(".")


@pytest.mark.parametrize("name", ["gone.wav", "empty.wav", "nothing.wav", "note.wav", "cut.wav"])
def test_header_check_finds_what_a_header_shows(tmp_path: Path, name: str) -> None:
    problem = damaged(tmp_path)[name]
    with pytest.raises(AudioError, match=problem):
        duration_s(tmp_path / name)


def test_wav_written_to_a_pipe_has_no_length_and_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "piped.wav"
    soundfile.write(path, tone(24_000), 24_000)
    content = bytearray(path.read_bytes())
    assert content[36:40] == b"data"
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert_is_tone(read_audio(path), 0.0)


def test_written_wav_reads_back_bit_exact(tmp_path: Path) -> None:
    steps = np.arange(-32_768, 32_768, 7, dtype=np.float32) / 32_768
    path = tmp_path / "new" / "a.wav"
    write_wav(path, steps)
    np.testing.assert_array_equal(read_audio(path), steps)
    with wave.open(str(path)) as stream:
        assert stream.getparams()[:3] == (1, 2, SAMPLE_RATE_HZ)


def test_write_clips_instead_of_wrapping(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.array([-3.0, -1.0, 0.0, 1.0, 3.0]))
    low, high = -1.0, 32_767 / 32_768
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav"), [low, low, 0.0, high, high])


@pytest.mark.parametrize(
    "audio", [np.array([0.0, np.nan]), np.array([np.inf]), np.zeros((2, 3)), np.zeros(0)]
)
def test_bad_samples_are_refused_and_the_old_file_stays(tmp_path: Path, audio: np.ndarray) -> None:
    path = tmp_path / "a.wav"
    write_wav(path, np.zeros(10))
    before = path.read_bytes()
    with pytest.raises(AudioError, match=r"a\.wav: not written"):
        write_wav(path, audio)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_write_where_a_folder_is(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="cannot be written"):
        write_wav(tmp_path, np.zeros(10))


def test_suffixes_are_lower_case_with_a_dot() -> None:
    assert all(s.startswith(".") and s == s.lower() for s in io.AUDIO_SUFFIXES)
