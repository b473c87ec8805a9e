"""Read any audio file as 24 kHz mono, and write 16-bit WAV.

libsndfile (through soundfile) reads what it can; ffmpeg (through pydub) reads the rest, such as
m4a, webm and wma. Heavy libraries are imported where they are used, to keep `--help` instant.
"""

from __future__ import annotations

import shutil
import struct
import warnings
import wave
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from csm_studio.constants import SAMPLE_RATE_HZ
from csm_studio.errors import AudioError
from csm_studio.files import atomic_path

if TYPE_CHECKING:
    import soundfile

AUDIO_SUFFIXES = frozenset(
    {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf"}
    | {".w64", ".rf64", ".m4a", ".m4b", ".mp4", ".mov", ".aac", ".ac3", ".webm", ".mka", ".mkv"}
    | {".wma", ".amr", ".3gp", ".wv", ".tta", ".spx"}
)
"""File name endings (lower case) that are taken for audio when a folder is searched."""

READING_ID = f"{SAMPLE_RATE_HZ} Hz, mean of channels, audresample, version 1"
"""Names how `read_audio` makes samples from a file; change it whenever they would change."""

MISSING_ALLOWED_S = 0.1
"""Audio that a header may promise beyond what the file holds; recorders are often this sloppy."""

_BLOCK_FRAMES = 1 << 20
_UNKNOWN_FRAMES = 2**63 - 1  # SF_COUNT_MAX, for FLAC written to a pipe
_UNKNOWN_WAV_BYTES = 0x7FFF0000  # and above: what programs write that do not know the length yet
_PCM16_SCALE = 32_768
_RERECORD = "Export or record it again, or remove it"


def read_audio(path: Path | str) -> np.ndarray:
    """Read an audio file as 24 kHz mono. Channels are averaged.

    Args:
        path: A file that libsndfile or ffmpeg can read. Its content decides, not its suffix.

    Returns:
        Samples, float32 (S,), S >= 1, nominally in [-1, 1].

    Raises:
        AudioError: The file is missing, a folder, empty, not audio, cut short, has no samples, or
            has samples that are NaN or infinite.
    """
    source = _checked(Path(path))
    samples, rate_hz = _read_with_libsndfile(source) or _read_with_ffmpeg(source)
    if samples.size == 0:
        raise _no_samples(source)
    if not np.isfinite(samples).all():
        where_s = int(np.argmin(np.isfinite(samples))) / rate_hz
        raise AudioError(
            f"{source}: has NaN or infinite samples (the first at {where_s:.2f} s). {_RERECORD}."
        )
    resampled = _resample(source, samples, rate_hz)
    if resampled.size == 0:
        raise _no_samples(source)
    return resampled


def duration_s(path: Path | str) -> float:
    """Return how long an audio file is, from its header where libsndfile knows the format.

    An MP3 without a frame count and what only ffmpeg reads are decoded in full.

    Raises:
        AudioError: As `read_audio`, but damage behind the header goes unseen.
    """
    source = _checked(Path(path))
    stream = _open_with_libsndfile(source)
    if stream is None:
        samples, rate_hz = _read_with_ffmpeg(source)
        frames = samples.size
    else:
        with stream:
            frames, rate_hz = stream.frames, stream.samplerate
    if frames == 0:
        raise _no_samples(source)
    return frames / rate_hz


def write_wav(path: Path | str, audio: np.ndarray) -> None:
    """Write a 24 kHz mono 16-bit WAV file atomically. Samples beyond [-1, 1] are clipped.

    Args:
        path: The file to write; its folder is made if needed.
        audio: float (S,), S >= 1.

    Raises:
        AudioError: The samples are none, not one row, or not all finite; or the file cannot be
            written.
    """
    target = Path(path)
    samples = np.asarray(audio)
    if samples.ndim != 1 or samples.size == 0:
        raise AudioError(
            f"{target}: not written, the audio has shape {samples.shape}; give one row of samples."
        )
    if not np.isfinite(samples).all():
        raise AudioError(
            f"{target}: not written, the audio has samples that are NaN or infinite."
            " The model or the processing before it went wrong."
        )
    scaled = np.rint(samples.astype(np.float64) * _PCM16_SCALE)
    pcm = np.clip(scaled, -_PCM16_SCALE, _PCM16_SCALE - 1).astype("<i2")
    try:
        with atomic_path(target) as temporary, wave.open(str(temporary), "wb") as stream:
            stream.setnchannels(1)
            stream.setsampwidth(2)
            stream.setframerate(SAMPLE_RATE_HZ)
            stream.writeframes(pcm.tobytes())
    except OSError as error:
        raise AudioError(
            f"{target}: cannot be written ({error.strerror}). Choose another place."
        ) from error


def _checked(path: Path) -> Path:
    try:
        if path.is_dir():
            raise AudioError(f"{path}: is a folder. Give an audio file.")
        with path.open("rb") as stream:
            if not stream.read(1):
                raise AudioError(f"{path}: is empty (0 bytes). {_RERECORD}.")
    except FileNotFoundError as error:
        raise AudioError(f"{path}: not found. Check the path.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AudioError(f"{path}: cannot be opened ({reason}). Check the path.") from error
    return path


def _no_samples(path: Path) -> AudioError:
    return AudioError(f"{path}: holds no sound (0 samples). {_RERECORD}.")


def _cut_short(path: Path, present_s: float, promised_s: float) -> AudioError:
    return AudioError(
        f"{path}: is cut short ({present_s:.2f} s of {promised_s:.2f} s are there)."
        " Copy or export it again, or remove it."
    )


def _open_with_libsndfile(path: Path) -> soundfile.SoundFile | None:
    """Open a file, or return None where libsndfile cannot read it or would not read all of it."""
    import soundfile

    with path.open("rb") as stream:
        head = stream.read(10)
    try:
        stream = soundfile.SoundFile(str(path))
    except (soundfile.SoundFileError, RuntimeError, TypeError, OSError):
        return None
    if stream.frames == _UNKNOWN_FRAMES or (
        # Without a frame count, libsndfile guesses the length from the first frame's bit rate and
        # stops there.
        stream.format == "MP3" and not _mp3_has_frame_count(path, head)
    ):
        stream.close()
        return None
    if head.startswith(b"RIFF"):
        missing_s = _missing_wav_s(path)
        if missing_s > MISSING_ALLOWED_S:
            present_s = stream.frames / stream.samplerate
            stream.close()
            raise _cut_short(path, present_s, present_s + missing_s)
    return stream


def _read_with_libsndfile(path: Path) -> tuple[np.ndarray, int] | None:
    import soundfile

    stream = _open_with_libsndfile(path)
    if stream is None:
        return None
    blocks: list[np.ndarray] = []
    with stream:
        rate_hz = stream.samplerate
        try:
            while len(block := stream.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
                blocks.append(block.mean(axis=1))
        except (soundfile.SoundFileError, RuntimeError, OSError) as error:
            raise AudioError(
                f"{path}: is damaged or cut short ({error}). Copy or export it again, or remove it."
            ) from error
        samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
        if stream.frames - samples.size > MISSING_ALLOWED_S * rate_hz:
            raise _cut_short(path, samples.size / rate_hz, stream.frames / rate_hz)
    return samples, rate_hz


def _read_with_ffmpeg(path: Path) -> tuple[np.ndarray, int]:
    try:
        with warnings.catch_warnings():
            # pydub warns on import where no ffmpeg is on the path; the bundled one is given below.
            warnings.simplefilter("ignore")
            from pydub import AudioSegment
            from pydub.exceptions import CouldntDecodeError
    except ImportError as error:
        raise AudioError(
            f"{path}: this format needs pydub, which cannot be imported ({error})."
            " Run `pip install -r requirements.txt`, or convert the file to WAV."
        ) from error
    segment_class = type("Segment", (AudioSegment,), {"converter": _ffmpeg(path)})
    try:
        with path.open("rb") as stream:
            # `from_file` would ask ffprobe, which the bundled ffmpeg comes without.
            segment = segment_class.from_file_using_temporary_files(stream)  # type: ignore[attr-defined]
    except (CouldntDecodeError, OSError, ValueError, LookupError, EOFError, wave.Error) as error:
        raise AudioError(
            f"{path}: is not audio, or is damaged: neither libsndfile nor ffmpeg can read it."
            f" {_RERECORD}."
        ) from error
    pcm = np.array(segment.get_array_of_samples(), dtype=np.float32).reshape(-1, segment.channels)
    return pcm.mean(axis=1) / (1 << (8 * segment.sample_width - 1)), segment.frame_rate


def _ffmpeg(path: Path) -> str:
    """Return the system's ffmpeg, or the one that imageio-ffmpeg carries."""
    if found := shutil.which("ffmpeg"):
        return found
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise AudioError(
            f"{path}: this format needs ffmpeg, and none was found."
            " Run `pip install imageio-ffmpeg`, or convert the file to WAV."
        ) from error


def _resample(path: Path, samples: np.ndarray, rate_hz: int) -> np.ndarray:
    if rate_hz == SAMPLE_RATE_HZ:
        return np.ascontiguousarray(samples, np.float32)
    import audresample

    try:
        return audresample.resample(samples.astype(np.float32), rate_hz, SAMPLE_RATE_HZ)[0]
    except (RuntimeError, ValueError) as error:
        raise AudioError(
            f"{path}: cannot be brought from {rate_hz} Hz to {SAMPLE_RATE_HZ} Hz ({error})."
            " Convert it to a 24 kHz WAV."
        ) from error


def _mp3_has_frame_count(path: Path, head: bytes) -> bool:
    """Return whether an MP3's first frame holds a Xing, Info or VBRI table."""
    start = 0
    if head.startswith(b"ID3"):
        # The tag's size is written in 7 bits per byte, without its own 10 bytes of header.
        start = 10 + int("".join(f"{byte:07b}" for byte in head[6:10]), 2)
    with path.open("rb") as stream:
        stream.seek(start)
        first_frame = stream.read(192)
    return any(name in first_frame for name in (b"Xing", b"Info", b"VBRI"))


def _missing_wav_s(path: Path) -> float:
    """Return how much sound a WAV file's data chunk promises beyond the end of the file.

    Source: RIFF WAVE; the `fmt ` chunk has the bytes per second at its bytes 8 to 11.
    """
    size = path.stat().st_size
    bytes_per_second = 0
    position = 12
    with path.open("rb") as stream:
        while True:
            stream.seek(position)
            header = stream.read(8)
            if len(header) < 8:
                return 0.0
            name, length = struct.unpack("<4sI", header)
            if name == b"fmt ":
                bytes_per_second = int.from_bytes(stream.read(12)[8:], "little")
            elif name == b"data":
                missing = max(0, position + 8 + length - size)
                known = length < _UNKNOWN_WAV_BYTES and bytes_per_second > 0
                return missing / bytes_per_second if known else 0.0
            position += 8 + length + length % 2
