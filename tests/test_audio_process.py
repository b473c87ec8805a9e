"""Trimming keeps all speech, loudness is the standard's, and outlines miss no sample."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from csm_studio.audio import loudness
from csm_studio.audio.loudness import integrated_loudness_lufs
from csm_studio.audio.process import normalise_loudness, speech_span, trim_silence, waveform_peaks
from csm_studio.constants import SAMPLE_RATE_HZ
from tests.sample_speech import noise_like, sample_clips, seconds, silence, tight_clips, tone


def steps(*levels_and_lengths: tuple[float, float]) -> np.ndarray:
    """A 997 Hz tone whose peak level changes in steps: (dBFS, seconds) each."""
    return np.concatenate([tone(997, s, 10 ** (db / 20)) for db, s in levels_and_lengths])


def time_domain_lufs(frequencies_hz: list[float], length_s: float) -> float:
    """Ungated loudness of a sum of tones at 48 kHz, filtered sample by sample."""
    rate_hz = 48_000
    t = np.arange(round(rate_hz * length_s)) / rate_hz
    signal = sum(0.1 * np.sin(2 * np.pi * f * t) for f in frequencies_hz)
    for b, a in (
        ((1.53512485958697, -2.69169618940638, 1.19839281085285), (-1.69065929318241, 0.73248077421585)),  # noqa: E501
        ((1.0, -2.0, 1.0), (-1.99004745483398, 0.99007225036621)),
    ):  # fmt: skip
        filtered, x1, x2, y1, y2 = [], 0.0, 0.0, 0.0, 0.0
        for x in signal.tolist():
            y = b[0] * x + b[1] * x1 + b[2] * x2 - a[0] * y1 - a[1] * y2
            x1, x2, y1, y2 = x, x1, y, y1
            filtered.append(y)
        signal = np.array(filtered)
    return -0.691 + 10 * math.log10(np.mean(signal**2))


@pytest.mark.parametrize("length_s", [0.4, 3.0, 61.3])
def test_full_scale_tone_has_the_standards_loudness(length_s: float) -> None:
    assert integrated_loudness_lufs(tone(997, length_s)) == pytest.approx(-3.01, abs=0.02)


@pytest.mark.parametrize("frequencies_hz", [[40.0], [120.0], [1_900.0], [9_000.0], [90.0, 4_000.0]])
def test_weighting_is_that_of_the_printed_filters(frequencies_hz: list[float]) -> None:
    ours = np.sum([tone(f, 2.0, 0.1) for f in frequencies_hz], axis=0)
    expected = time_domain_lufs(frequencies_hz, 2.0)
    assert integrated_loudness_lufs(ours) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    "levels_and_lengths",
    [
        # EBU Tech 3341, cases 3 and 4; mono is 3.01 LU below the stereo they are written for.
        [(-36, 10), (-23, 60), (-36, 10)],
        [(-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)],
    ],
)
def test_gates_leave_out_what_is_quiet(levels_and_lengths: list[tuple[float, float]]) -> None:
    measured = integrated_loudness_lufs(steps(*levels_and_lengths))
    assert measured == pytest.approx(-26.01, abs=0.1)


def test_what_is_below_the_absolute_gate_does_not_count() -> None:
    # At -71.5 LUFS the second half is below -70, and above the relative gate.
    measured = integrated_loudness_lufs(steps((-60, 10), (-68.5, 10)))
    assert measured == pytest.approx(-63.01, abs=0.1)


def test_long_recordings_measure_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    # The step into the offset, and no second one, is far louder than the tone.
    clip = tone(997, (1 << 16) / SAMPLE_RATE_HZ, 0.01) + 0.5
    whole = integrated_loudness_lufs(clip)
    monkeypatch.setattr(loudness, "_PART_SAMPLES", 2_400 * 11)
    assert integrated_loudness_lufs(clip) == pytest.approx(whole, abs=0.01)


def test_loudness_follows_gain_and_silence_has_none() -> None:
    for index, clip in enumerate(sample_clips()[:8]):
        lower = integrated_loudness_lufs(clip * 10 ** (-index / 20))
        assert lower == pytest.approx(integrated_loudness_lufs(clip) - index, abs=1e-3)
    assert integrated_loudness_lufs(silence(2)) == -math.inf
    assert integrated_loudness_lufs(silence(0)) == -math.inf
    assert integrated_loudness_lufs(tone(997, 0.1)) == pytest.approx(-3.01, abs=0.5)


def test_normalised_clips_reach_the_target_or_the_peak_limit() -> None:
    rng = np.random.default_rng(0)
    bound_by = set()
    for clip in sample_clips()[::3]:
        target, limit = rng.uniform(-30, -10), rng.uniform(-6, -0.5)
        audio = clip * np.float32(10 ** (rng.uniform(-40, 0) / 20))
        normal = normalise_loudness(audio, target, limit)
        peak_dbfs = 20 * math.log10(np.abs(normal).max())
        loudness_lufs = integrated_loudness_lufs(normal)
        assert peak_dbfs <= limit + 1e-3
        assert loudness_lufs <= target + 0.1
        reached, limited = loudness_lufs > target - 0.1, peak_dbfs > limit - 1e-3
        assert reached or limited
        bound_by.add(limited and not reached)
        # Gain alone: every sample changes by the same factor.
        gain = np.abs(normal).max() / np.abs(audio).max()
        np.testing.assert_allclose(normal, audio * gain, rtol=1e-4, atol=1e-8)
    assert bound_by == {True, False}


def test_silence_is_not_made_loud() -> None:
    np.testing.assert_array_equal(normalise_loudness(silence(1)), silence(1))
    assert normalise_loudness(silence(0)).size == 0


@pytest.mark.parametrize("noise_below_db", [math.inf, 70.0, 50.0])
@pytest.mark.parametrize("gain_db", [0.0, -20.0])
def test_trimming_takes_silence_and_no_speech(noise_below_db: float, gain_db: float) -> None:
    for seed, speech in enumerate(tight_clips()[::2]):
        rng = np.random.default_rng(seed)
        before, after = rng.uniform(0.5, 3), rng.uniform(0.5, 3)
        clean = np.concatenate([silence(before), speech, silence(after)])
        noisy = clean + noise_like(clean, noise_below_db, seed, speech)
        start, end = trim_silence(noisy * np.float32(10 ** (gain_db / 20)))
        inside = float(np.sum(np.square(clean[start:end], dtype=np.float64)))
        assert inside >= (1 - 1e-5) * float(np.sum(np.square(clean, dtype=np.float64)))
        # What is left of the silence: the margin of 0.1 s, a fade and two frames.
        first, last = seconds(before), seconds(before) + speech.size
        assert first - start <= seconds(0.25)
        assert end - last <= seconds(0.25)


def test_margin_is_kept_where_there_is_one() -> None:
    clip = np.concatenate([silence(1.0), tone(300, 1.0, 0.3), silence(0.05)])
    for pad_s in (0.0, 0.1, 0.4):
        start, end = trim_silence(clip, pad_s)
        assert start == pytest.approx(seconds(1.0 - pad_s), abs=seconds(0.02))
        assert end == pytest.approx(min(clip.size, seconds(2.0 + pad_s)), abs=seconds(0.02))
        assert start <= seconds(1.0)
        assert end >= seconds(2.0)


def test_a_soft_word_after_a_pause_is_kept() -> None:
    word = tight_clips()[1][: seconds(0.8)]
    soft = word * np.float32(10 ** (-35 / 20))
    clip = np.concatenate([silence(1), word, silence(0.6), soft, silence(1)])
    _, end = trim_silence(clip + noise_like(clip, 75, 0, word))
    assert end >= clip.size - seconds(1.0)


def test_a_soft_release_behind_a_closure_is_kept() -> None:
    release = tone(3_000, 0.06, 10 ** (-57 / 20))
    clip = np.concatenate([silence(1), tone(300, 1, 0.3), silence(0.04), release, silence(1)])
    room = np.random.default_rng(0).standard_normal(clip.size) * 10 ** (-72 / 20)
    span = speech_span(clip + room)
    assert span is not None
    assert span[1] >= seconds(2.1)
    # The same sound by itself is too soft to be speech.
    clip[seconds(2.04) : seconds(2.1)] = 0
    clip[seconds(2.54) : seconds(2.6)] = release
    span = speech_span(clip + room)
    assert span is not None
    assert span[1] < seconds(2.1)


def test_a_click_is_no_speech() -> None:
    speech = tight_clips()[0]
    clip = np.concatenate([silence(1.0), speech, silence(1.0)])
    clip[seconds(0.2) : seconds(0.205)] += 0.5
    start, _ = trim_silence(clip)
    assert seconds(0.7) < start <= seconds(1.0)


@pytest.mark.parametrize(
    "clip",
    [
        silence(0),
        silence(0.001),
        silence(2),
        tone(200, 2, 0.5),
        noise_like(np.ones(48_000), 60, seed=1),
        noise_like(np.ones(48_000), 10, seed=2),
    ],
    ids=["nothing", "24 samples", "zeros", "tone", "quiet noise", "loud noise"],
)
def test_clips_without_contrast_are_kept_whole(clip: np.ndarray) -> None:
    assert trim_silence(clip) == (0, clip.size)


def test_an_offset_and_rumble_are_no_sound() -> None:
    clean = np.concatenate([silence(1.0), tight_clips()[3], silence(1.0)])
    spoilt = clean + 0.1 + tone(8, clean.size / SAMPLE_RATE_HZ, 0.02)
    clean_span, spoilt_span = speech_span(clean), speech_span(spoilt)
    assert clean_span is not None
    assert spoilt_span is not None
    np.testing.assert_allclose(spoilt_span, clean_span, atol=seconds(0.1))


def test_outline_is_the_extremes_of_every_column() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        audio = rng.standard_normal(int(rng.integers(1, 5_000))).astype(np.float32)
        num_bins = int(rng.integers(1, audio.size + 1))
        peaks = waveform_peaks(audio, num_bins)
        edges = [index * audio.size // num_bins for index in range(num_bins + 1)]
        columns = [audio[a:b] for a, b in itertools.pairwise(edges)]
        expected = [(column.min(), column.max()) for column in columns]
        np.testing.assert_array_equal(peaks, np.array(expected, np.float32))
        assert peaks.dtype == np.float32


def test_outline_of_few_samples_and_of_none() -> None:
    np.testing.assert_array_equal(
        waveform_peaks(np.array([1.0, -2.0]), 4), [[1, 1], [1, 1], [-2, -2], [-2, -2]]
    )
    np.testing.assert_array_equal(waveform_peaks(silence(0), 3), np.zeros((3, 2)))
