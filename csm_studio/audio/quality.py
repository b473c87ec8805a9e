"""Measures of a clip that tell whether it is fit to train on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from csm_studio.audio.levels import (
    FRAME_SAMPLES,
    HOP_SAMPLES,
    LOWEST_DBFS,
    decibels,
    frame_levels,
    levels_by_part,
    runs,
    speech_frames,
    speech_levels,
    without_rumble,
)
from csm_studio.audio.loudness import SILENT_LUFS, integrated_loudness_lufs
from csm_studio.constants import SAMPLE_RATE_HZ

_FULL_SCALE = 32_766 / 32_768  # within rounding of 16 bits: a low tone's own peak is not as flat
_FULL_SCALE_RESAMPLED = 0.99  # resampling makes what was flat ripple
_MIN_CLIPPED_RUN = 3

_END_SAMPLES = SAMPLE_RATE_HZ * 30 // 1_000
_CUT_BELOW_SPEECH_DB = 25.0  # a word that has faded this far is over

_SPECTRUM_SAMPLES = 1_024
_MAX_SPECTRA = 2_000
_SMOOTHED_BINS = 5
_BAND_BELOW_PEAK_DB = 70.0  # below the highs of any voice, above 16 bits' rounding


@dataclass(frozen=True)
class ClipMeasures:
    """What was measured of a clip. All figures are finite.

    Attributes:
        duration_s: Length.
        original_rate_hz: Sample rate of the file it came from.
        original_channels: Channels of that file.
        peak_dbfs: Highest sample; -120 for nothing but zeros.
        loudness_lufs: Integrated loudness (ITU-R BS.1770-4); -70 for silence.
        num_clipped: Samples at full scale in runs of three or more.
        has_speech: Whether anything rises out of the noise; the silences are 0 where it does not.
        silence_start_s: Silence before the first speech.
        silence_end_s: Silence after the last.
        silence_inside_s: The longest silence between.
        speech_dbfs: Level of voiced speech; -120 where there is none.
        noise_floor_dbfs: Level of the silences; of the quietest tenth of a clip without any.
        bandwidth_hz: Highest frequency that holds energy; tells a clip that once had a lower rate.
        starts_abruptly: Speech is under way in the first 30 ms: the first word is cut off.
        ends_abruptly: Speech is under way in the last 30 ms: the last word is cut off.
    """

    duration_s: float
    original_rate_hz: int
    original_channels: int
    peak_dbfs: float
    loudness_lufs: float
    num_clipped: int
    has_speech: bool
    silence_start_s: float
    silence_end_s: float
    silence_inside_s: float
    speech_dbfs: float
    noise_floor_dbfs: float
    bandwidth_hz: float
    starts_abruptly: bool
    ends_abruptly: bool


def measure(audio: np.ndarray, original_rate_hz: int, original_channels: int) -> ClipMeasures:
    """Measure a clip before anything is done to it: a change of gain hides clipping.

    Args:
        audio: 24 kHz, float (S,).
        original_rate_hz: Sample rate of the file it was read from.
        original_channels: Channels of that file.
    """
    clean = without_rumble(audio)
    levels = frame_levels(clean)
    found = speech_levels(levels)
    speech = speech_frames(levels, levels_by_part(levels))
    start_s, end_s, inside_s = _silences_s(speech, audio.size)
    cut_dbfs = LOWEST_DBFS
    if found:
        cut_dbfs = max(found.threshold_dbfs, found.speech_dbfs - _CUT_BELOW_SPEECH_DB)
    has_speech = bool(speech.any())
    peak = float(np.abs(audio).max(initial=0.0))
    return ClipMeasures(
        duration_s=audio.size / SAMPLE_RATE_HZ,
        original_rate_hz=original_rate_hz,
        original_channels=original_channels,
        peak_dbfs=float(decibels(peak**2)),
        loudness_lufs=max(SILENT_LUFS, integrated_loudness_lufs(audio)),
        num_clipped=_num_clipped(audio, original_rate_hz != SAMPLE_RATE_HZ),
        has_speech=has_speech,
        silence_start_s=start_s,
        silence_end_s=end_s,
        silence_inside_s=inside_s,
        speech_dbfs=found.speech_dbfs if found and has_speech else LOWEST_DBFS,
        noise_floor_dbfs=_noise_floor_dbfs(levels, speech),
        bandwidth_hz=_bandwidth_hz(clean),
        starts_abruptly=has_speech and _level_dbfs(clean[:_END_SAMPLES]) > cut_dbfs,
        ends_abruptly=has_speech and _level_dbfs(clean[-_END_SAMPLES:]) > cut_dbfs,
    )


def _level_dbfs(clean: np.ndarray) -> float:
    return float(decibels(np.mean(np.square(clean, dtype=np.float64))))


def _num_clipped(audio: np.ndarray, was_resampled: bool) -> int:
    limit = _FULL_SCALE_RESAMPLED if was_resampled else _FULL_SCALE
    lengths = np.concatenate(
        [np.diff(runs(at_limit)).ravel() for at_limit in (audio >= limit, audio <= -limit)]
    )
    return int(lengths[lengths >= _MIN_CLIPPED_RUN].sum())


def _silences_s(speech: np.ndarray, num_samples: int) -> tuple[float, float, float]:
    """Return the silence before, after and at the longest inside."""
    stretches = runs(speech)
    if len(stretches) == 0:
        return 0.0, 0.0, 0.0
    end = min(num_samples, int(stretches[-1, 1] - 1) * HOP_SAMPLES + FRAME_SAMPLES)
    # A frame of silence that touches the speech before reaches a hop into the pause.
    inside = (stretches[1:, 0] - stretches[:-1, 1] - 1) * HOP_SAMPLES
    return (
        int(stretches[0, 0]) * HOP_SAMPLES / SAMPLE_RATE_HZ,
        (num_samples - end) / SAMPLE_RATE_HZ,
        max(0, int(inside.max(initial=0))) / SAMPLE_RATE_HZ,
    )


def _noise_floor_dbfs(levels: np.ndarray, speech: np.ndarray) -> float:
    # The last frame runs beyond the end.
    whole, silent = levels[:-1], levels[:-1][~speech[:-1]]
    if silent.size:
        return float(decibels(np.mean(10 ** (silent.astype(np.float64) / 10))))
    return float(np.percentile(whole, 10)) if whole.size else LOWEST_DBFS


def _bandwidth_hz(clean: np.ndarray) -> float:
    padded = np.pad(clean, (0, max(0, _SPECTRUM_SAMPLES - clean.size)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, _SPECTRUM_SAMPLES)
    step = max(_SPECTRUM_SAMPLES // 2, -(-len(windows) // _MAX_SPECTRA))
    spectra = np.fft.rfft(windows[::step] * np.hanning(_SPECTRUM_SAMPLES), axis=1)
    power = np.square(np.abs(spectra)).mean(axis=0)
    smooth = np.convolve(power, np.full(_SMOOTHED_BINS, 1 / _SMOOTHED_BINS), mode="same")
    held = np.flatnonzero(smooth > smooth.max() * 10 ** (-_BAND_BELOW_PEAK_DB / 10))
    return float(held[-1] * SAMPLE_RATE_HZ / _SPECTRUM_SAMPLES) if held.size else 0.0
