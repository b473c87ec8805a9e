"""Mimi codes of clips, computed once and kept on disk.

A cache entry is named by what decides its content: the audio file's bytes, how samples are made
from them, and the codec's weights. Renaming a file or changing its text costs nothing.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import numpy as np

from csm_studio.audio.io import READING_ID, duration_s, read_audio
from csm_studio.constants import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from csm_studio.dataset.records import Clip
from csm_studio.errors import AudioError, DatasetError
from csm_studio.files import atomic_path, sha256_file

DEFAULT_BATCH_S = 60.0
"""Seconds of audio, padding included, that are encoded together."""

_ENTRY_FORMAT = "codes uint16 (K, T), zero-padded to whole frames, version 1"


class AudioEncoder(Protocol):
    """What turns audio into codes, such as the Mimi codec. It must be causal."""

    def encode(self, audio: mx.array) -> mx.array:
        """Return codes, int32 (B, K, T), for 24 kHz audio, float32 (B, 1920 T)."""
        ...


@dataclass(frozen=True)
class CodeStore:
    """The cache of codes.

    Attributes:
        root: Its folder.
        codec_id: Names the codec and its weights; a hash of them is best.
    """

    root: Path
    codec_id: str

    def key(self, audio_path: Path) -> str:
        """Return the name of an audio file's entry: 64 hex digits.

        Raises:
            AudioError: The file cannot be opened.
        """
        try:
            content = sha256_file(audio_path)
        except FileNotFoundError as error:
            raise AudioError(f"{audio_path}: not found. Check the path.") from error
        except OSError as error:
            raise AudioError(
                f"{audio_path}: cannot be opened ({error.strerror}). Check the path."
            ) from error
        settings = "\n".join((_ENTRY_FORMAT, READING_ID, self.codec_id, content))
        return hashlib.sha256(settings.encode()).hexdigest()

    def path(self, key: str) -> Path:
        """Return where the entry of `key` lies, or would lie."""
        return self.root / key[:2] / f"{key}.npz"

    def load(self, key: str) -> np.ndarray | None:
        """Return codes, int32 (K, T), or None where the entry is missing or damaged."""
        try:
            # Reading the whole member first checks its CRC, which tells a flipped bit from a code.
            with zipfile.ZipFile(self.path(key)) as entry:
                content = entry.read("codes.npy")
            codes = np.load(io.BytesIO(content), allow_pickle=False)
        except (OSError, EOFError, ValueError, LookupError, RuntimeError, zipfile.BadZipFile):
            return None
        if codes.dtype != np.uint16 or codes.ndim != 2 or codes.size == 0:
            return None
        return codes.astype(np.int32)

    def save(self, key: str, codes: np.ndarray) -> None:
        """Write codes, integer (K, T), each from 0 to 65535, atomically."""
        if codes.min() < 0 or codes.max() > np.iinfo(np.uint16).max:
            raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit the cache")
        with atomic_path(self.path(key)) as temporary:
            np.savez(temporary, codes=codes.astype(np.uint16))


def encode_clips(
    clips: Sequence[Clip],
    codec: AudioEncoder,
    store: CodeStore,
    *,
    batch_s: float = DEFAULT_BATCH_S,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """Return the codes of each clip, from the cache where it has them.

    Each recording is padded with zeros to whole frames. Recordings of similar length are encoded
    together, padded on the right and cut afterwards; the codec is causal, so the codes equal those
    of one at a time.

    Args:
        clips: The clips; files with the same bytes are encoded once.
        codec: The encoder, called on this thread only.
        store: The cache; every batch is written as soon as it is done.
        batch_s: Seconds of audio to encode together. A longer clip is encoded alone.
        progress: Called with (clips done, number of clips).

    Returns:
        For each clip int32 (K, T), T = ceil(samples / 1920).

    Raises:
        DatasetError: Files cannot be read: all are listed, after the good ones were cached.
    """
    reader = _Reader(store, batch_s)
    key_of_path = reader.keys({clip.audio_path for clip in clips})
    key_of_clip = [key_of_path.get(clip.audio_path) for clip in clips]
    codes = {key: found for key in key_of_path.values() if (found := store.load(key)) is not None}

    def report() -> None:
        if progress is not None:
            progress(sum(key in codes for key in key_of_clip), len(clips))

    report()
    missing: dict[str, list[Path]] = defaultdict(list)
    for path, key in key_of_path.items():
        if key not in codes:
            missing[key].append(path)
    for batch in _read_ahead(reader.batches(missing)):
        for key, encoded in _encode(batch, codec).items():
            store.save(key, encoded)
            codes[key] = encoded
        report()
    if reader.problems:
        count = len(reader.problems)
        raise DatasetError(
            f"{count} audio file{'s' * (count > 1)} cannot be used; the others are encoded and"
            " kept. Mend these or take them out of the dataset.",
            [reader.problems[path] for path in sorted(reader.problems)],
        )
    return [codes[key] for key in key_of_clip if key is not None]


@dataclass(frozen=True)
class _Recording:
    key: str
    samples: np.ndarray

    @property
    def num_frames(self) -> int:
        return -(-self.samples.size // SAMPLES_PER_FRAME)


class _Reader:
    """Reads recordings into batches, and gathers what cannot be read."""

    def __init__(self, store: CodeStore, batch_s: float) -> None:
        self._store = store
        self._max_frames = batch_s * SAMPLE_RATE_HZ / SAMPLES_PER_FRAME
        self.problems: dict[Path, str] = {}

    def keys(self, paths: set[Path]) -> dict[Path, str]:
        keys: dict[Path, str] = {}
        for path in sorted(paths):
            try:
                keys[path] = self._store.key(path)
            except AudioError as error:
                self.problems[path] = str(error)
        return keys

    def batches(self, paths: dict[str, list[Path]]) -> Iterator[list[_Recording]]:
        """Yield the recordings of each key's first path, the shortest first."""
        batch: list[_Recording] = []
        for key in self._shortest_first(paths):
            try:
                recording = _Recording(key, read_audio(paths[key][0]))
            except AudioError as error:
                self._note(paths[key], error)
                continue
            longest = max([recording, *batch], key=lambda one: one.num_frames)
            if batch and longest.num_frames * (len(batch) + 1) > self._max_frames:
                yield batch
                batch = []
            batch.append(recording)
        if batch:
            yield batch

    def _shortest_first(self, paths: dict[str, list[Path]]) -> list[str]:
        lengths: dict[str, float] = {}
        for key, same in paths.items():
            try:
                lengths[key] = duration_s(same[0])
            except AudioError as error:
                self._note(same, error)
        return sorted(lengths, key=lambda key: (lengths[key], key))

    def _note(self, same: Sequence[Path], error: AudioError) -> None:
        reason = str(error).removeprefix(f"{same[0]}: ")
        self.problems.update((path, f"{path}: {reason}") for path in same)


def _read_ahead(batches: Iterator[list[_Recording]]) -> Iterator[list[_Recording]]:
    """Yield batches, reading the next on another thread meanwhile."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-audio") as executor:
        pending = executor.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = executor.submit(next, batches, None)
            yield batch


def _encode(batch: Sequence[_Recording], codec: AudioEncoder) -> dict[str, np.ndarray]:
    num_frames = max(recording.num_frames for recording in batch)
    audio = np.zeros((len(batch), num_frames * SAMPLES_PER_FRAME), np.float32)
    for row, recording in zip(audio, batch, strict=True):
        row[: recording.samples.size] = recording.samples
    codes = np.array(codec.encode(mx.array(audio)), dtype=np.int32)
    if codes.ndim != 3 or codes.shape[::2] != (len(batch), num_frames):
        raise ValueError(f"codec gave shape {codes.shape} for {len(batch)} x {num_frames} frames")
    return {recording.key: codes[i, :, : recording.num_frames] for i, recording in enumerate(batch)}
