"""A long recording comes apart in its pauses, and no speech is lost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pydub import AudioSegment
from pydub.silence import detect_silence

from csm_studio.audio import split
from csm_studio.audio.levels import PART_FRAMES
from csm_studio.audio.split import split_at_silences
from csm_studio.constants import SAMPLE_RATE_HZ
from csm_studio.errors import OptionError
from tests.sample_speech import noise_like, seconds, silence, tight_clips, tone

LONG_ENOUGH = 3.2


def recording(
    pieces: list[np.ndarray], pauses_s: list[float]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Join pieces with a pause before each and one at the end; tell where they came to lie."""
    parts, spans, position = [], [], 0
    for piece, pause_s in zip(pieces, pauses_s, strict=True):
        position += seconds(pause_s)
        spans.append((position, position + piece.size))
        parts += [silence(pause_s), piece]
        position += piece.size
    return np.concatenate([*parts, silence(1.0)]), spans


def random_recording(seed: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    rng = np.random.default_rng(seed)
    long = [clip for clip in tight_clips() if clip.size > seconds(LONG_ENOUGH)]
    chosen = [long[index] for index in rng.permutation(len(long))[:10]]
    return recording(chosen, rng.uniform(0.8, 1.6, len(chosen)).tolist())


def assert_sound(clips: list[tuple[int, int]], num_samples: int, longest_s: float = 12.0) -> None:
    """Clips lie in order inside the recording, share nothing, and are not too long."""
    assert all(0 <= start < end <= num_samples for start, end in clips)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(clips))
    assert all(end - start <= longest_s * SAMPLE_RATE_HZ for start, end in clips)


def outside(clips: list[tuple[int, int]], num_samples: int) -> np.ndarray:
    mask = np.ones(num_samples, bool)
    for start, end in clips:
        mask[start:end] = False
    return mask


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("noise_below_db", "gain_db"), [(80.0, 0.0), (40.0, -30.0), (20.0, 0.0), (20.0, -30.0)]
)
def test_joined_clips_come_apart_again(seed: int, noise_below_db: float, gain_db: float) -> None:
    clean, spans = random_recording(seed)
    noisy = (clean + noise_like(clean, noise_below_db, seed)) * np.float32(10 ** (gain_db / 20))
    clips = split_at_silences(noisy)
    assert_sound(clips, clean.size)
    assert len(clips) == len(spans)
    np.testing.assert_allclose(clips, spans, atol=seconds(0.3))
    lost = np.square(clean[outside(clips, clean.size)], dtype=np.float64).sum()
    allowed = 1e-6 if noise_below_db > 30 else 1e-3  # the weakest sounds drown in the noise
    assert lost <= allowed * np.square(clean, dtype=np.float64).sum()


@pytest.mark.parametrize("seed", range(6))
def test_no_speech_is_lost_whatever_the_pauses(seed: int) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(tight_clips()))[:15]
    pauses_s = rng.exponential(0.7, order.size).tolist()
    clean, _ = recording([tight_clips()[index] for index in order], pauses_s)
    clips = split_at_silences(clean + noise_like(clean, 60, seed))
    assert_sound(clips, clean.size)
    lost = np.square(clean[outside(clips, clean.size)], dtype=np.float64).sum()
    assert lost <= 1e-5 * np.square(clean, dtype=np.float64).sum()


def test_clips_keep_a_little_of_the_silence_at_both_ends() -> None:
    tones = [tone(200, length_s, 0.3) for length_s in (4.0, 4.0, 8.0)]
    clean, spans = recording(tones, [2.0, 2.0, 0.3])
    kept_s = [(0.2, 0.2), (0.2, 0.15), (0.15, 0.2)]  # the last two share a short pause
    expected = [
        (start - seconds(before_s), end + seconds(after_s))
        for (start, end), (before_s, after_s) in zip(spans, kept_s, strict=True)
    ]
    np.testing.assert_allclose(split_at_silences(clean), expected, atol=seconds(0.02))


def test_short_pieces_are_joined_across_short_pauses() -> None:
    clean, spans = recording([tone(200, 1.0, 0.3)] * 9, [0.4] * 9)
    clips = split_at_silences(clean)
    assert_sound(clips, clean.size)
    assert all(end - start >= seconds(3.0) for start, end in clips)
    held = [sum(start <= a and b <= end for a, b in spans) for start, end in clips]
    assert sum(held) == len(spans)
    assert min(held) > 1


def test_a_short_piece_far_from_all_others_stays_alone() -> None:
    clean, spans = recording(
        [tone(200, 4.0, 0.3), tone(200, 0.5, 0.3), tone(200, 4.0, 0.3)], [5.0] * 3
    )
    clips = split_at_silences(clean)
    assert len(clips) == 3
    np.testing.assert_allclose(clips, spans, atol=seconds(0.25))


def test_the_longer_pause_is_taken() -> None:
    pauses_s = [0.5, 0.3, 0.3, 0.7, 0.3, 0.3]
    clean, spans = recording([tone(200, 3.0, 0.3)] * 6, pauses_s)
    clips = split_at_silences(clean)
    assert len(clips) == 2
    np.testing.assert_allclose(
        clips, [(spans[0][0], spans[2][1]), (spans[3][0], spans[5][1])], atol=seconds(0.25)
    )


def test_speech_without_a_pause_is_cut_where_it_is_quietest() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        speech = 0.2 * rng.standard_normal(seconds(40)).astype(np.float32)
        dips_s = np.cumsum(rng.uniform(7, 10, 4))
        for dip_s in dips_s:
            speech[seconds(dip_s) : seconds(dip_s + 0.06)] *= 0.5
        clean = np.concatenate([silence(1.0), speech, silence(1.0)])
        clips = split_at_silences(clean)
        assert_sound(clips, clean.size)
        assert not outside(clips, clean.size)[seconds(1.0) : seconds(41.0)].any()
        cuts_s = [end / SAMPLE_RATE_HZ - 1.0 for _, end in clips[:-1]]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(clips))
        near = [min(abs(cut_s - dip_s - 0.03) for dip_s in dips_s) for cut_s in cuts_s]
        assert len(cuts_s) >= 3
        assert max(near) <= 0.03


@pytest.mark.parametrize("seed", range(8))
def test_speech_without_a_pause_is_cut_to_any_length(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shortest_s, pad_s = rng.uniform(0.2, 4), rng.uniform(0, 0.3)
    longest_s = 2 * shortest_s + 2 * pad_s + rng.choice([1.0, 1.5, 4.0])
    speech = 0.2 * rng.standard_normal(seconds(rng.uniform(longest_s, 5 * longest_s)))
    clean = np.concatenate([silence(1), speech.astype(np.float32), silence(1)])
    clips = split_at_silences(clean, shortest_s, longest_s, pad_s)
    assert_sound(clips, clean.size, longest_s)
    assert len(clips) > 1 or speech.size < seconds(longest_s)
    assert all(end - start >= seconds(shortest_s) - 1 for start, end in clips)
    assert not outside(clips, clean.size)[seconds(1) : seconds(1) + speech.size].any()


def test_real_speech_without_pauses_is_split_all_the_same() -> None:
    clean = np.concatenate(tight_clips()[:40])
    clips = split_at_silences(clean)
    assert_sound(clips, clean.size)
    assert all(end - start >= seconds(2.5) for start, end in clips)
    lost = np.square(clean[outside(clips, clean.size)], dtype=np.float64).sum()
    assert lost <= 1e-6 * np.square(clean, dtype=np.float64).sum()


def test_noise_that_starts_in_the_middle_does_not_hide_the_pauses() -> None:
    long = [clip for clip in tight_clips() if clip.size > seconds(LONG_ENOUGH)]
    clean, spans = recording(long, [1.0] * len(long))
    fan = noise_like(clean, 30, seed=0)
    fan[: clean.size // 2] *= 0.05
    clips = split_at_silences(clean + fan)
    matched = [
        span
        for span in spans
        if any(np.allclose(span, clip, rtol=0, atol=seconds(0.3)) for clip in clips)
    ]
    assert len(matched) >= len(spans) - 4  # but for the few around the start of the noise


def test_clicks_in_pauses_make_no_clips() -> None:
    clean, spans = random_recording(seed=9)
    clicked = clean + noise_like(clean, 60, seed=9)
    for (_, end), (start, _) in itertools.pairwise(spans):
        clicked[(start + end) // 2 : (start + end) // 2 + 100] += 0.3
    assert len(split_at_silences(clicked)) == len(spans)


def test_a_word_that_fades_slowly_is_kept_to_its_end() -> None:
    fading = np.concatenate([tone(300, 4.0, 0.3), tone(300, 0.5, 10 ** (-57 / 20))])
    clean, spans = recording([fading, fading], [2.0, 2.0])
    room = np.random.default_rng(0).standard_normal(clean.size) * 10 ** (-72 / 20)
    clips = split_at_silences((clean + room).astype(np.float32))
    assert len(clips) == 2
    assert all(end >= last for (_, end), (_, last) in zip(clips, spans, strict=True))


def test_lengths_can_be_chosen() -> None:
    clean, _ = recording([*tight_clips()[:20]], [0.5] * 20)
    clips = split_at_silences(clean, shortest_s=1.0, longest_s=6.0, pad_s=0.05)
    assert_sound(clips, clean.size, longest_s=6.0)
    assert len(clips) > len(split_at_silences(clean))


@pytest.mark.parametrize(
    ("shortest_s", "longest_s", "pad_s"), [(3, 7.3, 0.2), (0, 12, 0.2), (3, 12, -0.1), (12, 3, 0.2)]
)
def test_lengths_that_contradict_each_other_are_refused(
    shortest_s: float, longest_s: float, pad_s: float
) -> None:
    with pytest.raises(OptionError, match="Give a shortest length above 0"):
        split_at_silences(tone(200, 5), shortest_s, longest_s, pad_s)


@pytest.mark.parametrize(
    "audio",
    [silence(0), silence(0.01), silence(20), noise_like(np.ones(240_000), 60, seed=3)],
    ids=["nothing", "10 ms", "zeros", "noise"],
)
def test_without_speech_there_are_no_clips(audio: np.ndarray) -> None:
    assert split_at_silences(audio) == []


def test_a_recording_that_is_one_clip_stays_one() -> None:
    for clip in tight_clips()[:10]:
        (found,) = split_at_silences(np.concatenate([silence(0.5), clip, silence(0.5)]))
        np.testing.assert_allclose(
            found, (seconds(0.5), seconds(0.5) + clip.size), atol=seconds(0.25)
        )


def test_parts_find_the_pauses_of_the_whole() -> None:
    audio, _ = recording([*tight_clips()[:30]], [0.3] * 30)
    for boundary_s in (30.0, 60.0):
        audio[seconds(boundary_s - 0.1) : seconds(boundary_s + 0.15)] = 0
    threshold_dbfs = -40.0
    num_parts = -(-audio.size // (PART_FRAMES * 240))
    assert num_parts > 2
    parts = split._silent_frames(audio, [threshold_dbfs] * num_parts, None)
    pcm = np.rint(audio.astype(np.float64) * 2**31).astype(np.int32)
    whole = AudioSegment(pcm.tobytes(), sample_width=4, frame_rate=SAMPLE_RATE_HZ, channels=1)
    expected = np.zeros(parts.size, bool)
    for start_ms, end_ms in detect_silence(whole, 200, threshold_dbfs, 10):
        expected[-(-start_ms // 10) : end_ms // 10] = True
    np.testing.assert_array_equal(parts, expected)


def test_progress_rises_to_the_end() -> None:
    told: list[float] = []
    split_at_silences(np.tile(tight_clips()[0], 20), on_progress=told.append)
    assert len(told) > 2
    assert told == sorted(told)
    assert told[-1] == 1.0
