"""The measures of a clip are those of signals whose properties are known."""

from __future__ import annotations

import dataclasses
import json
import math

import audresample
import numpy as np
import pytest

from csm_studio.audio.levels import frame_levels, levels_by_part, speech_frames, without_rumble
from csm_studio.audio.process import trim_silence
from csm_studio.audio.quality import ClipMeasures, measure
from csm_studio.constants import SAMPLE_RATE_HZ
from tests.sample_speech import noise_like, sample_clips, seconds, silence, tight_clips, tone


def measured(audio: np.ndarray, original_rate_hz: int = SAMPLE_RATE_HZ) -> ClipMeasures:
    return measure(audio, original_rate_hz, 1)


def through_rate(audio: np.ndarray, rate_hz: int) -> np.ndarray:
    narrow = audresample.resample(audio.astype(np.float32), SAMPLE_RATE_HZ, rate_hz)[0]
    return audresample.resample(narrow, rate_hz, SAMPLE_RATE_HZ)[0]


def test_plain_figures() -> None:
    clip = measure(tone(997, 2.5, 0.5), 44_100, 2)
    assert clip.duration_s == 2.5
    assert (clip.original_rate_hz, clip.original_channels) == (44_100, 2)
    assert clip.peak_dbfs == pytest.approx(20 * math.log10(0.5), abs=0.01)
    assert clip.loudness_lufs == pytest.approx(-3.01 + 20 * math.log10(0.5), abs=0.02)
    assert clip.speech_dbfs == pytest.approx(20 * math.log10(0.5) - 3.01, abs=0.3)


@pytest.mark.parametrize(
    "audio", [silence(0), silence(0.0005), silence(1), tone(200, 0.01), tone(200, 1)]
)
def test_all_figures_are_finite_and_fit_into_json(audio: np.ndarray) -> None:
    json.dumps(dataclasses.asdict(measured(audio)), allow_nan=False)


def test_silence_has_no_speech() -> None:
    clip = measured(silence(2))
    assert not clip.has_speech
    assert (clip.peak_dbfs, clip.loudness_lufs, clip.bandwidth_hz) == (-120.0, -70.0, 0.0)
    assert not clip.starts_abruptly
    assert not clip.ends_abruptly


@pytest.mark.parametrize("seed", range(5))
def test_silences_are_as_long_as_they_were_made(seed: int) -> None:
    rng = np.random.default_rng(seed)
    before_s, inside_s, after_s = rng.uniform(0.3, 2, 3)
    one, other = (tight_clips()[index] for index in rng.choice(len(tight_clips()), 2, False))
    clean = np.concatenate([silence(before_s), one, silence(inside_s), other, silence(after_s)])
    clip = measured(clean + noise_like(clean, 65, seed))
    assert clip.silence_start_s == pytest.approx(before_s, abs=0.1)
    # Words may end more softly than noise lets hear, and hold pauses of their own.
    assert clip.silence_inside_s == pytest.approx(inside_s, abs=0.2)
    assert clip.silence_end_s == pytest.approx(after_s, abs=0.2)


def test_silences_between_tones_are_exact_to_a_frame() -> None:
    tones = [silence(0.7), tone(300, 1), silence(0.4), tone(300, 1), silence(1.1), tone(300, 1)]
    clip = measured(np.concatenate([*tones, silence(0.25)]))
    assert clip.silence_start_s == pytest.approx(0.7, abs=0.021)
    assert clip.silence_inside_s == pytest.approx(1.1, abs=0.041)
    assert clip.silence_end_s == pytest.approx(0.25, abs=0.021)


@pytest.mark.parametrize("floor_dbfs", [-75.0, -60.0, -45.0])
def test_noise_floor(floor_dbfs: float) -> None:
    rng = np.random.default_rng(0)
    clean = np.concatenate([silence(1), tight_clips()[0], silence(1)])
    noise = rng.standard_normal(clean.size) * 10 ** (floor_dbfs / 20)
    assert measured(clean + noise).noise_floor_dbfs == pytest.approx(floor_dbfs, abs=1.5)


def test_clipped_samples_are_counted() -> None:
    for seed in range(5):
        gain = np.random.default_rng(seed).uniform(1.2, 4)
        clean = tone(150 + 10 * seed, 1, gain)
        clipped = np.clip(clean, -1, 1)
        expected = int((np.abs(clean) >= 1).sum())
        assert measured(clipped).num_clipped == pytest.approx(expected, rel=0.01)
        pcm16 = np.clip(np.rint(clipped * 32_768), -32_768, 32_767) / 32_768
        assert measured(pcm16).num_clipped == pytest.approx(expected, rel=0.01)
    for clip in sample_clips()[:5]:
        assert measured(clip).num_clipped == 0
        assert measured(np.clip(clip * 6, -1, 1)).num_clipped > 100


def test_runs_of_two_and_peaks_at_full_scale_are_not_clipping() -> None:
    pairs = tone(300, 1, 0.3)
    pairs[5_000:5_002] = 1.0
    pairs[6_000:6_002] = -1.0
    assert measured(pairs).num_clipped == 0
    pairs[7_000:7_003] = -1.0
    assert measured(pairs).num_clipped == 3
    for frequency_hz in (80, 150, 400):
        assert measured(tone(frequency_hz, 1, 1.0)).num_clipped == 0


@pytest.mark.parametrize("rate_hz", [22_050, 44_100, 48_000])
def test_clipping_is_seen_through_resampling(rate_hz: int) -> None:
    t = np.arange(rate_hz) / rate_hz
    clean = 2.0 * np.sin(2 * np.pi * 180 * t)
    clipped = np.clip(clean, -1, 1).astype(np.float32)
    audio = audresample.resample(clipped, rate_hz, SAMPLE_RATE_HZ)[0]
    expected = (np.abs(clean) >= 1).mean() * SAMPLE_RATE_HZ
    assert measured(audio, rate_hz).num_clipped == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 12_000, 16_000])
def test_bandwidth_tells_the_rate_a_clip_once_had(rate_hz: int) -> None:
    noise = noise_like(np.ones(48_000), 20, seed=rate_hz)
    assert measured(through_rate(noise, rate_hz)).bandwidth_hz == pytest.approx(
        rate_hz / 2, rel=0.06
    )
    for clip in sample_clips()[-5:]:
        narrow = np.rint(through_rate(clip, rate_hz) * 32_768) / 32_768
        assert 0.85 * rate_hz / 2 <= measured(narrow).bandwidth_hz <= 1.03 * rate_hz / 2


def test_full_band_has_full_bandwidth() -> None:
    assert measured(noise_like(np.ones(48_000), 20, seed=0)).bandwidth_hz > 11_500


def test_clips_cut_in_a_word_are_found() -> None:
    rng = np.random.default_rng(0)
    found = []
    for clip in sample_clips()[::2]:
        levels = frame_levels(without_rumble(clip))
        frames = np.flatnonzero(speech_frames(levels, levels_by_part(levels)))
        inside = frames[(frames > frames[0] + 50) & (frames < frames[-1] - 50)]
        for cut in rng.choice(inside, 4) * 240 + 240:
            first, second = measured(clip[:cut]), measured(clip[cut:])
            found += [first.ends_abruptly, second.starts_abruptly]
            # Only the cut end is to be blamed.
            assert not first.starts_abruptly
            assert not second.ends_abruptly
    assert np.mean(found) > 0.85  # the rest falls into the closures of p, t and k


def test_whole_clips_are_not_called_cut() -> None:
    for clip in sample_clips():
        trimmed = measured(clip[slice(*trim_silence(clip))])
        assert not trimmed.starts_abruptly
        assert not trimmed.ends_abruptly


def test_gain_changes_levels_and_nothing_else() -> None:
    for clip in sample_clips()[:10]:
        loud, quiet = measured(clip), measured(clip * np.float32(0.25))
        off_db = 20 * math.log10(0.25)
        assert quiet.peak_dbfs == pytest.approx(loud.peak_dbfs + off_db, abs=0.01)
        assert quiet.loudness_lufs == pytest.approx(loud.loudness_lufs + off_db, abs=0.01)
        assert quiet.bandwidth_hz == loud.bandwidth_hz
        assert quiet.ends_abruptly == loud.ends_abruptly
        assert quiet.duration_s == loud.duration_s == clip.size / seconds(1)
