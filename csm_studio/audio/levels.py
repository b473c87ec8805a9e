"""Where speech is in a recording, by its own level: no fixed threshold fits two microphones.

A frame is 20 ms; frames start every 10 ms, so that frame i covers samples 240 i to 240 i + 480.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from csm_studio.constants import SAMPLE_RATE_HZ

HOP_SAMPLES = SAMPLE_RATE_HZ // 100
FRAME_SAMPLES = 2 * HOP_SAMPLES

PART_FRAMES = 3_000
"""Half a minute: the noise is taken to be the same for as long."""

LOWEST_DBFS = -120.0
"""What a level of nothing at all is given as, to keep minus infinity out of sums and files."""

_RUMBLE_WINDOW = SAMPLE_RATE_HZ // 80  # its moving average passes what is below about 50 Hz
_PART_SAMPLES = HOP_SAMPLES * 6_000  # a minute at a time bounds the memory

_DIGITAL_SILENCE_DBFS = -85.0  # below any microphone: inserted zeros, or dither alone
_AUDIBLE_DBFS = -50.0  # without any contrast, a clip louder than this is taken for sound
_MIN_CONTRAST_DB = 10.0
_FLAT_FLOOR_DB = 5.0  # noise alone varies less than this from frame to frame, speech much more
_FLOOR_PERCENTILES = (2, 5, 10)
_SPEECH_PERCENTILE = 75

# The threshold is this much of the way from the floor to speech, and at least so far above.
_THRESHOLD_SHARE = 0.25
_THRESHOLD_ABOVE_FLOOR_DB = 8.0
_EDGE_SHARE = 0.12
_EDGE_ABOVE_FLOOR_DB = 3.0
_WEAKEST_BELOW_SPEECH_DB = 45.0  # f, th and fading vowels are about this much below the vowels
_INAUDIBLE_BELOW_SPEECH_DB = 55.0
_STRONGEST_BELOW_SPEECH_DB = 30.0
_STRONGEST_IN_NOISE_DB = 10.0

_BRIDGED_FRAMES = 6  # the closure before a p, t or k
_CLICK_FRAMES = 6  # with the frame's own length: a click; no syllable is as short
_CLICK_APART_FRAMES = 30  # no closure is as long, so that the end of a word is no click


@dataclass(frozen=True)
class SpeechLevels:
    """The levels of one recording.

    Attributes:
        floor_dbfs: Its noise between words.
        speech_dbfs: Its voiced speech.
        threshold_dbfs: Speech rises above this somewhere.
        edge_dbfs: And lasts as long as it stays above this.
    """

    floor_dbfs: float
    speech_dbfs: float
    threshold_dbfs: float
    edge_dbfs: float


def decibels(power: np.ndarray | float) -> np.ndarray:
    """Return 10 log10 of a power, `LOWEST_DBFS` at least."""
    return 10 * np.log10(np.maximum(power, 10 ** (LOWEST_DBFS / 10)))


def without_rumble(audio: np.ndarray) -> np.ndarray:
    """Take away an offset and what is below about 50 Hz, which no voice has.

    Args:
        audio: float (S,).

    Returns:
        float32 (S,).
    """
    left = _RUMBLE_WINDOW // 2
    right = _RUMBLE_WINDOW - 1 - left
    clean = np.empty(audio.size, np.float32)
    for start in range(0, audio.size, _PART_SAMPLES):
        end = min(start + _PART_SAMPLES, audio.size)
        around = audio[max(0, start - left) : end + right]
        missing = (max(0, left - start), max(0, end + right - audio.size))
        sums = np.cumsum(np.pad(around, (missing[0] + 1, missing[1]), mode="edge"), dtype=float)
        mean = (sums[_RUMBLE_WINDOW:] - sums[:-_RUMBLE_WINDOW]) / _RUMBLE_WINDOW
        clean[start:end] = audio[start:end] - mean
    return clean


def frame_levels(clean: np.ndarray) -> np.ndarray:
    """Return the level of every frame.

    Args:
        clean: float32 (S,), from `without_rumble`.

    Returns:
        dBFS of the mean square, float32 (F,), F = ceil(S / 240). The recording is taken to go on
        in silence.
    """
    num_frames = -(-clean.size // HOP_SAMPLES)
    hops = np.zeros(num_frames + 1)
    for first in range(0, num_frames, _PART_SAMPLES // HOP_SAMPLES):
        part = clean[first * HOP_SAMPLES : first * HOP_SAMPLES + _PART_SAMPLES]
        part = np.pad(part, (0, -part.size % HOP_SAMPLES)).reshape(-1, HOP_SAMPLES)
        hops[first : first + len(part)] = np.einsum("fs,fs->f", part, part)
    return decibels((hops[:-1] + hops[1:]) / FRAME_SAMPLES).astype(np.float32)


def speech_levels(levels: np.ndarray) -> SpeechLevels | None:
    """Tell speech from the noise between words by the spread of the levels.

    Args:
        levels: float32 (F,), from `frame_levels`.

    Returns:
        The levels, or None for a recording in which nothing rises out of a quiet noise.
    """
    sounding = levels[levels > _DIGITAL_SILENCE_DBFS]
    if sounding.size == 0:
        return None
    floor, loud = np.percentile(sounding, (_FLOOR_PERCENTILES[1], 95))
    if loud - floor < _MIN_CONTRAST_DB:
        if sounding.size == levels.size and floor < _AUDIBLE_DBFS:
            return None
        floor = LOWEST_DBFS
    above = levels[levels > floor + _MIN_CONTRAST_DB]
    return _with_thresholds(sounding, float(np.percentile(above, _SPEECH_PERCENTILE)))


def levels_by_part(levels: np.ndarray) -> list[SpeechLevels]:
    """Tell the levels of every `PART_FRAMES` frames, for noise that changes in a long recording.

    Args:
        levels: float32 (F,), from `frame_levels`.

    Returns:
        One entry per part, the last may be short; none where `speech_levels` finds no speech.
    """
    whole = speech_levels(levels)
    if whole is None:
        return []
    parts = []
    for start in range(0, levels.size, PART_FRAMES):
        around = levels[max(0, start - PART_FRAMES // 2) : start + PART_FRAMES * 3 // 2]
        sounding = around[around > _DIGITAL_SILENCE_DBFS]
        parts.append(_with_thresholds(sounding, whole.speech_dbfs) if sounding.size else whole)
    return parts


def speech_frames(levels: np.ndarray, parts: Sequence[SpeechLevels]) -> np.ndarray:
    """Return which frames hold speech, bool (F,).

    A stretch above the edge level counts if it rises above the threshold somewhere, and is no
    click: shorter than any syllable and apart from all other sound.

    Args:
        levels: float32 (F,), from `frame_levels`.
        parts: From `levels_by_part`.
    """
    speech = np.zeros(levels.size, bool)
    if not parts:
        return speech
    part_of_frame = np.arange(levels.size) // PART_FRAMES
    edges = np.array([part.edge_dbfs for part in parts])[part_of_frame]
    thresholds = np.array([part.threshold_dbfs for part in parts])[part_of_frame]
    stretches = runs(_without_gaps(levels > edges))
    if len(stretches) == 0:
        return speech
    excess = np.maximum.reduceat(levels - thresholds, stretches[:, 0])
    stretches = stretches[excess > 0]
    far = levels.size + _CLICK_APART_FRAMES + 1
    pauses = np.diff(np.concatenate([[-far], stretches.ravel(), [far + levels.size]]))[::2]
    is_click = (pauses[:-1] > _CLICK_APART_FRAMES) & (pauses[1:] > _CLICK_APART_FRAMES)
    is_click &= stretches[:, 1] - stretches[:, 0] < _CLICK_FRAMES
    for start, end in stretches[~is_click]:
        speech[start:end] = True
    return speech


def _with_thresholds(sounding: np.ndarray, speech: float) -> SpeechLevels:
    below, floor, above = np.percentile(sounding, _FLOOR_PERCENTILES).tolist()
    # Only a steady floor is noise for sure; otherwise it may be the weakest speech of a clip
    # without pauses, and the threshold stays well below speech.
    is_noise = above - below < _FLAT_FLOOR_DB
    closest = _STRONGEST_IN_NOISE_DB if is_noise else _STRONGEST_BELOW_SPEECH_DB
    threshold = floor + max(_THRESHOLD_ABOVE_FLOOR_DB, _THRESHOLD_SHARE * (speech - floor))
    threshold = min(max(threshold, speech - _WEAKEST_BELOW_SPEECH_DB), speech - closest)
    edge = floor + max(_EDGE_ABOVE_FLOOR_DB, _EDGE_SHARE * (speech - floor))
    edge = min(max(edge, speech - _INAUDIBLE_BELOW_SPEECH_DB), threshold)
    return SpeechLevels(floor, speech, threshold, edge)


def runs(mask: np.ndarray) -> np.ndarray:
    """Return start and end of every stretch of True, int64 (N, 2)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    return edges.reshape(-1, 2)


def _without_gaps(mask: np.ndarray) -> np.ndarray:
    filled = mask.copy()
    for start, end in runs(~mask):
        if start > 0 and end < mask.size and end - start <= _BRIDGED_FRAMES:
            filled[start:end] = True
    return filled
