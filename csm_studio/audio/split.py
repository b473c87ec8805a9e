"""Cut a long recording into clips of a few seconds that begin and end in silence."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from csm_studio.audio.levels import (
    HOP_SAMPLES,
    PART_FRAMES,
    frame_levels,
    levels_by_part,
    runs,
    speech_frames,
    without_rumble,
)
from csm_studio.constants import SAMPLE_RATE_HZ
from csm_studio.errors import OptionError

SHORTEST_S = 3.0
LONGEST_S = 12.0
PAD_S = 0.2
"""Silence of a pause that a clip keeps at either end, at most."""

_PAUSE_MS = 200  # shorter ones are closures of consonants
_HOP_MS = 1_000 * HOP_SAMPLES // SAMPLE_RATE_HZ
_QUIETEST_HOPS = 5  # 50 ms

# What a clip costs. A second of silence too many inside weighs as much as lacking half of the
# shortest length; a cut in a pause of half a second is free, a cut in no pause costs one.
_COMFORTABLE_PAUSE_S = 0.5
_PAUSE_INSIDE_S = 0.6
_COST_PER_S_INSIDE = 2.0
_COST_OF_SHORTNESS = 4.0


def split_at_silences(
    audio: np.ndarray,
    shortest_s: float = SHORTEST_S,
    longest_s: float = LONGEST_S,
    pad_s: float = PAD_S,
    on_progress: Callable[[float], None] | None = None,
) -> list[tuple[int, int]]:
    """Find clips that hold all of the speech of a recording and share no sample.

    What counts as silence follows from the recording's own noise and speech levels. Cuts fall into
    the longest pauses that give clips of the wished length; speech that goes on for longer without
    a pause is cut where it is quietest. A clip is shorter than `shortest_s` only where long pauses
    on both sides leave nothing to join it with.

    Args:
        audio: 24 kHz, float (S,).
        shortest_s: Shortest clip wished for.
        longest_s: No clip is longer; at least twice `shortest_s`, a pad at either end, and a second
            to choose the place of a cut in.
        pad_s: Silence kept at both ends of a clip; half of the pause where that is less.
        on_progress: Told the share of the recording that has been searched, 0 to 1.

    Returns:
        First sample and end of every clip, in order; none where there is no speech.

    Raises:
        OptionError: The lengths contradict each other.
    """
    pad, shortest = round(pad_s * SAMPLE_RATE_HZ), round(shortest_s * SAMPLE_RATE_HZ)
    longest_speech = math.floor(longest_s * SAMPLE_RATE_HZ) - 2 * pad
    if shortest <= 0 or pad < 0 or longest_speech < 2 * shortest + SAMPLE_RATE_HZ:
        raise OptionError(
            f"Clips of {shortest_s:g} to {longest_s:g} s with {pad_s:g} s of silence at both ends"
            " cannot be cut. Give a shortest length above 0 and a longest of"
            f" {2 * shortest_s + 2 * pad_s + 1:g} s or more."
        )
    clean = without_rumble(audio)
    levels = frame_levels(clean)
    parts = levels_by_part(levels)
    speech = speech_frames(levels, parts)
    silent = _silent_frames(clean, [part.threshold_dbfs for part in parts], on_progress) & ~speech
    pieces = [
        cut
        for start, end in runs(~silent)
        if speech[start:end].any()  # else it is a click in a pause
        for cut in _cut_long(
            int(start) * HOP_SAMPLES,
            min(int(end) * HOP_SAMPLES, audio.size),
            levels,
            shortest,
            longest_speech,
        )
    ]
    return _joined(pieces, _padded(pieces, pad, audio.size), shortest, longest_speech + 2 * pad)


def _silent_frames(
    clean: np.ndarray,
    thresholds_dbfs: Sequence[float],
    on_progress: Callable[[float], None] | None,
) -> np.ndarray:
    """Return which steps of 10 ms lie in a pause, bool (ceil(S / 240),)."""
    with warnings.catch_warnings():
        # pydub warns on import where no ffmpeg is on the path; none is needed here.
        warnings.simplefilter("ignore")
        from pydub import AudioSegment
        from pydub.silence import detect_silence
    silent = np.zeros(-(-clean.size // HOP_SAMPLES), bool)
    part_samples = PART_FRAMES * HOP_SAMPLES
    # Parts overlap so that every window is seen whole once.
    overlap = (_PAUSE_MS // _HOP_MS - 1) * HOP_SAMPLES
    for index, threshold_dbfs in enumerate(thresholds_dbfs):
        start = index * part_samples
        part = clean[start : start + part_samples + overlap].astype(np.float64)
        # 32 bits, so that pauses of quiet recordings are more than a few steps high.
        pcm = np.clip(np.rint(part * 2**31), -(2**31), 2**31 - 1).astype(np.int32)
        segment = AudioSegment(pcm.tobytes(), sample_width=4, frame_rate=SAMPLE_RATE_HZ, channels=1)
        for begin_ms, end_ms in detect_silence(segment, _PAUSE_MS, threshold_dbfs, _HOP_MS):
            first = start // HOP_SAMPLES + -(-begin_ms // _HOP_MS)
            silent[first : start // HOP_SAMPLES + end_ms // _HOP_MS] = True
        if on_progress:
            on_progress(min(1.0, (start + part_samples) / clean.size))
    return silent


def _cut_long(
    start: int, end: int, levels: np.ndarray, shortest: int, longest: int
) -> list[tuple[int, int]]:
    """Cut a stretch of speech at quiet places, so that no piece is longer than `longest`."""
    pieces = []
    while end - start > longest:
        first = -(-(start + shortest) // HOP_SAMPLES)
        last = min(start + longest, end - shortest) // HOP_SAMPLES
        power = 10 ** (levels[first:last].astype(np.float64) / 10)
        # A frame is two hops long.
        sums = np.convolve(power, np.ones(_QUIETEST_HOPS - 1), mode="valid")
        cut = (first + int(np.argmin(sums))) * HOP_SAMPLES + _QUIETEST_HOPS * HOP_SAMPLES // 2
        pieces.append((start, cut))
        start = cut
    return [*pieces, (start, end)]


def _padded(pieces: list[tuple[int, int]], pad: int, num_samples: int) -> np.ndarray:
    """Give every piece its share of the pauses around it: start and end, int64 (N, 2)."""
    spans = np.array(pieces, np.int64).reshape(-1, 2)
    half_pauses = (spans[1:, 0] - spans[:-1, 1]) // 2
    before = np.concatenate([spans[:1, 0], half_pauses])
    after = np.concatenate([half_pauses, num_samples - spans[-1:, 1]])
    return spans + np.stack([-np.minimum(before, pad), np.minimum(after, pad)], axis=1)


def _joined(
    pieces: list[tuple[int, int]], padded: np.ndarray, shortest: int, longest: int
) -> list[tuple[int, int]]:
    """Join neighbours to the clips that together cost least."""
    pauses_s = np.array(
        [later[0] - earlier[1] for earlier, later in itertools.pairwise(pieces)], np.float64
    )
    pauses_s /= SAMPLE_RATE_HZ
    cut_costs = [*np.maximum(0, 1 - pauses_s / _COMFORTABLE_PAUSE_S).tolist(), 0.0]
    inside = np.maximum(0, pauses_s - _PAUSE_INSIDE_S) * _COST_PER_S_INSIDE
    inside_sums = np.concatenate([[0.0], np.cumsum(inside)]).tolist()
    starts, ends = padded.T.tolist()
    best = [0.0]
    came_from = [0]
    for last, end in enumerate(ends):
        options = []
        for first in range(last, -1, -1):
            length = end - starts[first]
            if length > longest:
                break
            shortness = _COST_OF_SHORTNESS * max(0, shortest - length) / shortest
            pauses = inside_sums[last] - inside_sums[first]
            options.append((best[first] + shortness + pauses + cut_costs[last], first))
        cost, first = min(options)
        best.append(cost)
        came_from.append(first)
    clips = []
    position = len(pieces)
    while position:
        clips.append((starts[came_from[position]], ends[position - 1]))
        position = came_from[position]
    return clips[::-1]
