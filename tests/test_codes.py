"""Codes are computed once, the same in a batch as alone, and kept when a clip is bad."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import soundfile

from csm_studio.audio.io import read_audio, write_wav
from csm_studio.constants import SAMPLES_PER_FRAME
from csm_studio.dataset.codes import CodeStore, encode_clips
from csm_studio.dataset.records import Clip
from csm_studio.errors import DatasetError

NUM_CODEBOOKS = 4


class CountingCodec:
    """A causal codec: each frame's codes come from all samples up to its end."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    @property
    def num_rows(self) -> int:
        return sum(shape[0] for shape in self.shapes)

    def encode(self, audio: mx.array) -> mx.array:
        self.shapes.append(audio.shape)
        assert audio.dtype == mx.float32
        assert audio.shape[1] % SAMPLES_PER_FRAME == 0
        frames = mx.abs(audio).reshape(audio.shape[0], -1, SAMPLES_PER_FRAME)
        # Whole 16-bit steps, so that sums in any order are exact.
        energy = mx.cumsum(mx.round(frames * 32_768).astype(mx.int32).sum(axis=-1), axis=1)
        books = mx.arange(1, NUM_CODEBOOKS + 1)[None, :, None]
        return (energy[:, None, :] * books) % 2048


def make_clips(folder: Path, lengths: list[int], seed: int = 0) -> list[Clip]:
    rng = np.random.default_rng(seed)
    clips = []
    for number, length in enumerate(lengths):
        path = folder / f"clip_{number:04}.wav"
        write_wav(path, rng.uniform(-0.5, 0.5, length))
        clips.append(Clip(f"Text {number}.", path, 0))
    return clips


def alone(clip: Clip) -> np.ndarray:
    """Encode one clip without the code under test."""
    audio = read_audio(clip.audio_path)
    num_frames = -(-audio.size // SAMPLES_PER_FRAME)
    padded = np.zeros((1, num_frames * SAMPLES_PER_FRAME), np.float32)
    padded[0, : audio.size] = audio
    return np.array(CountingCodec().encode(mx.array(padded)))[0]


@pytest.fixture
def store(tmp_path: Path) -> CodeStore:
    return CodeStore(tmp_path / "codes", "codec-1")


LENGTHS = [1920, 1, 9000, 1921, 5000, 1919, 3840, 30_000, 9100]


@pytest.mark.parametrize("batch_s", [0.01, 0.5, 1.0, 1000.0])
def test_batches_give_the_codes_of_one_at_a_time(
    tmp_path: Path, store: CodeStore, batch_s: float
) -> None:
    clips = make_clips(tmp_path, LENGTHS)
    codec = CountingCodec()
    codes = encode_clips(clips, codec, store, batch_s=batch_s)
    for clip, length, found in zip(clips, LENGTHS, codes, strict=True):
        assert found.dtype == np.int32
        assert found.shape == (NUM_CODEBOOKS, -(-length // SAMPLES_PER_FRAME))
        np.testing.assert_array_equal(found, alone(clip))
    assert codec.num_rows == len(clips)
    for shape in codec.shapes:
        assert shape[0] == 1 or shape[0] * shape[1] <= batch_s * 24_000
    widths = [shape[1] for shape in codec.shapes]
    assert widths == sorted(widths)


def test_second_run_never_calls_the_codec(tmp_path: Path, store: CodeStore) -> None:
    clips = make_clips(tmp_path, LENGTHS)
    first = encode_clips(clips, CountingCodec(), store)
    codec = CountingCodec()
    seen: list[tuple[int, int]] = []
    again = encode_clips(clips, codec, store, progress=lambda *done: seen.append(done))
    assert codec.shapes == []
    assert seen == [(len(clips), len(clips))]
    for one, two in zip(first, again, strict=True):
        assert two.dtype == np.int32
        np.testing.assert_array_equal(one, two)


def test_key_follows_the_content_and_the_codec_only(tmp_path: Path, store: CodeStore) -> None:
    a, b = make_clips(tmp_path, [2000, 2000])
    encode_clips([a, b], CountingCodec(), store)
    moved = a.audio_path.rename(tmp_path / "moved.wav")
    codec = CountingCodec()
    encode_clips([Clip("Other text.", moved, 7)], codec, store)
    assert codec.num_rows == 0
    assert store.key(moved) != store.key(b.audio_path)
    assert store.key(moved) != CodeStore(store.root, "codec-2").key(moved)
    write_wav(moved, np.full(2000, 0.25))
    encode_clips([Clip("Text.", moved, 0)], codec, store)
    assert codec.num_rows == 1


def test_duplicates_are_encoded_once(tmp_path: Path, store: CodeStore) -> None:
    (clip,) = make_clips(tmp_path, [4000])
    copy = tmp_path / "copy.wav"
    copy.write_bytes(clip.audio_path.read_bytes())
    codec = CountingCodec()
    codes = encode_clips([clip, Clip("Copy.", copy, 1), clip], codec, store)
    assert codec.num_rows == 1
    assert len(codes) == 3
    np.testing.assert_array_equal(codes[0], codes[1])
    np.testing.assert_array_equal(codes[0], codes[2])


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def damage_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    header_end = content.index(b"\n", content.index(b"NUMPY"))
    content[header_end + 3] ^= 0x01
    path.write_bytes(content)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_shape(path: Path) -> None:
    np.savez(path, codes=np.zeros(5, np.uint16))


def damage_pickle(path: Path) -> None:
    np.savez(path, codes=np.array([{}], dtype=object))


def damage_name(path: Path) -> None:
    np.savez(path, other=np.zeros((4, 3), np.uint16))


def damage_array(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.zeros((4, 3), np.uint16))


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_flip,
        damage_empty,
        damage_shape,
        damage_pickle,
        damage_name,
        damage_array,
    ],
)
def test_damaged_entry_is_computed_again(tmp_path: Path, store: CodeStore, damage) -> None:  # type: ignore[no-untyped-def]
    clips = make_clips(tmp_path, [9000, 3000])
    first = encode_clips(clips, CountingCodec(), store)
    entry = store.path(store.key(clips[0].audio_path))
    damage(entry)
    assert store.load(store.key(clips[0].audio_path)) is None
    codec = CountingCodec()
    again = encode_clips(clips, codec, store)
    assert codec.num_rows == 1
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(store.load(store.key(clips[0].audio_path)), first[0])


def test_no_flipped_byte_goes_unnoticed(tmp_path: Path, store: CodeStore) -> None:
    codes = np.arange(6, dtype=np.int32).reshape(2, 3)
    store.save("ab", codes)
    entry = store.path("ab")
    content = entry.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0xFF
        entry.write_bytes(changed)
        found = store.load("ab")  # zip has bytes without meaning, such as the time of day
        assert found is None or np.array_equal(found, codes)


def test_bad_clips_are_told_together_and_good_ones_are_kept(
    tmp_path: Path, store: CodeStore
) -> None:
    good = make_clips(tmp_path, [3000, 5000, 2000])
    noise = tmp_path / "noise.wav"
    noise.write_bytes(b"This is no audio at all.")
    same_noise = tmp_path / "same_noise.wav"
    same_noise.write_bytes(noise.read_bytes())
    empty = tmp_path / "empty.wav"
    empty.touch()
    cut = tmp_path / "cut.flac"
    whole = tmp_path / "whole.flac"
    soundfile.write(whole, np.random.default_rng(1).uniform(-0.5, 0.5, 24_000), 24_000)
    cut.write_bytes(whole.read_bytes()[:20_000])
    bad = [tmp_path / "gone.wav", noise, same_noise, empty, cut]
    clips = [good[0], *(Clip("Bad.", path, 0) for path in bad), *good[1:]]
    with pytest.raises(DatasetError) as caught:
        encode_clips(clips, CountingCodec(), store)
    assert len(caught.value.problems) == len(bad)
    for path in bad:
        assert sum(problem.startswith(f"{path}: ") for problem in caught.value.problems) == 1
    codec = CountingCodec()
    encode_clips(good, codec, store)
    assert codec.shapes == []


def test_progress_counts_clips_to_the_end(tmp_path: Path, store: CodeStore) -> None:
    clips = make_clips(tmp_path, [2000, 4000, 6000])
    encode_clips(clips[:1], CountingCodec(), store)
    seen: list[tuple[int, int]] = []
    encode_clips(
        clips, CountingCodec(), store, batch_s=0.01, progress=lambda *done: seen.append(done)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_failing_codec_keeps_what_was_done(tmp_path: Path, store: CodeStore) -> None:
    class Failing(CountingCodec):
        def encode(self, audio: mx.array) -> mx.array:
            if self.shapes:
                raise RuntimeError("out of memory")
            return super().encode(audio)

    clips = make_clips(tmp_path, [2000, 4000, 6000])
    with pytest.raises(RuntimeError, match="out of memory"):
        encode_clips(clips, Failing(), store, batch_s=0.01)
    codec = CountingCodec()
    encode_clips(clips, codec, store)
    assert codec.num_rows == 2


def test_wrong_codec_output_is_refused(tmp_path: Path, store: CodeStore) -> None:
    class Short(CountingCodec):
        def encode(self, audio: mx.array) -> mx.array:
            return super().encode(audio)[:, :, :-1]

    class Negative(CountingCodec):
        def encode(self, audio: mx.array) -> mx.array:
            return super().encode(audio) - 4096

    clips = make_clips(tmp_path, [4000])
    for codec, expected in ((Short(), "shape"), (Negative(), "do not fit")):
        with pytest.raises(ValueError, match=expected):
            encode_clips(clips, codec, store)
    assert list(store.root.rglob("*.npz")) == []


def test_no_clips(store: CodeStore) -> None:
    assert encode_clips([], CountingCodec(), store) == []
