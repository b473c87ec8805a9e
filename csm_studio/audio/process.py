"""What is done to the working copy of a clip, and its outline for drawing."""

from __future__ import annotations

import math

import numpy as np

from csm_studio.audio.levels import (
    FRAME_SAMPLES,
    HOP_SAMPLES,
    frame_levels,
    levels_by_part,
    speech_frames,
    without_rumble,
)
from csm_studio.audio.loudness import integrated_loudness_lufs
from csm_studio.constants import SAMPLE_RATE_HZ

TARGET_LUFS = -23.0
"""Loudness of programme material in EBU R 128; leaves room for the peaks of any voice."""

PEAK_LIMIT_DBFS = -1.0


def trim_silence(audio: np.ndarray, pad_s: float = 0.1) -> tuple[int, int]:
    """Find what to keep of a clip when the silence at its ends goes.

    Silence is judged by the clip's own levels (`csm_studio.audio.levels`); in doubt it is kept.

    Args:
        audio: 24 kHz, float (S,).
        pad_s: Silence kept before and after the speech, where there is as much.

    Returns:
        First sample and end of what to keep. A clip without speech is kept whole.
    """
    span = speech_span(audio)
    if span is None:
        return 0, audio.size
    pad = round(pad_s * SAMPLE_RATE_HZ)
    return max(0, span[0] - pad), min(audio.size, span[1] + pad)


def speech_span(audio: np.ndarray) -> tuple[int, int] | None:
    """Return the first sample and the end of the speech in a clip, or None if there is none.

    Args:
        audio: 24 kHz, float (S,).
    """
    levels = frame_levels(without_rumble(audio))
    frames = np.flatnonzero(speech_frames(levels, levels_by_part(levels)))
    if frames.size == 0:
        return None
    start = int(frames[0]) * HOP_SAMPLES
    return start, min(audio.size, int(frames[-1]) * HOP_SAMPLES + FRAME_SAMPLES)


def normalise_loudness(
    audio: np.ndarray,
    target_lufs: float = TARGET_LUFS,
    peak_limit_dbfs: float = PEAK_LIMIT_DBFS,
) -> np.ndarray:
    """Bring a clip to a loudness by gain alone: nothing is compressed.

    Args:
        audio: 24 kHz, float (S,).
        target_lufs: Integrated loudness (ITU-R BS.1770-4) to reach.
        peak_limit_dbfs: The gain stops where the highest sample gets there, short of the target.

    Returns:
        float32 (S,). Silence comes back as it is.
    """
    loudness_lufs = integrated_loudness_lufs(audio)
    if math.isinf(loudness_lufs):
        return np.array(audio, np.float32)
    peak_dbfs = 20 * math.log10(np.abs(audio).max())
    gain_db = min(target_lufs - loudness_lufs, peak_limit_dbfs - peak_dbfs)
    return (audio * 10 ** (gain_db / 20)).astype(np.float32)


def waveform_peaks(audio: np.ndarray, num_bins: int) -> np.ndarray:
    """Return the outline of a waveform.

    Args:
        audio: float (S,).
        num_bins: Columns of the drawing. With more columns than samples, samples repeat.

    Returns:
        Lowest and highest sample of every column, float32 (num_bins, 2).
    """
    if audio.size == 0:
        return np.zeros((num_bins, 2), np.float32)
    starts = np.arange(num_bins) * audio.size // num_bins
    lowest, highest = np.minimum.reduceat(audio, starts), np.maximum.reduceat(audio, starts)
    return np.stack([lowest, highest], axis=1).astype(np.float32)
