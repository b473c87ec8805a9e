"""How far a dataset is on its way to a voice: minutes, lengths and readiness."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from csm_studio.dataset.flags import CheckedClip

FIRST_TRY_MIN = 2.0
"""Minutes of one speaker from which training changes the voice audibly."""

READY_MIN = 10.0
"""Minutes of one speaker from which the method does well."""

PLENTY_MIN = 20.0
"""Minutes of one speaker beyond which variety and clean text matter more than length."""

LAST_EDGE_S = 30
"""Longer clips are counted in the histogram's last bar."""

_FIRST_LAST_EDGE_S = 12  # the longest clip that splitting makes


class Readiness(str, Enum):
    """How much there is of a speaker."""

    TOO_LITTLE = "too_little"
    FIRST_TRY = "first_try"
    READY = "ready"
    PLENTY = "plenty"


@dataclass(frozen=True)
class SpeakerHealth:
    """What there is of one speaker.

    Attributes:
        speaker: The number.
        num_clips: Clips kept.
        minutes: Their length together.
        readiness: Where that lies against the 10 to 20 minutes that the method wants.
        sentence: The same in plain words.
    """

    speaker: int
    num_clips: int
    minutes: float
    readiness: Readiness
    sentence: str


@dataclass(frozen=True)
class DatasetHealth:
    """What there is in all.

    Attributes:
        num_clips: Clips kept.
        minutes: Their length together.
        speakers: By number.
        edges_s: Edges of the histogram of lengths, one more than its bars; clips beyond the last
            edge are counted in the last bar.
        counts: Clips per bar.
    """

    num_clips: int
    minutes: float
    speakers: tuple[SpeakerHealth, ...]
    edges_s: tuple[float, ...]
    counts: tuple[int, ...]


def health(rows: Iterable[CheckedClip]) -> DatasetHealth:
    """Sum up a dataset.

    Args:
        rows: The clips that are kept, and no others.
    """
    lengths_s: defaultdict[int, list[float]] = defaultdict(list)
    for row in rows:
        lengths_s[row.speaker].append(row.measures.duration_s)
    all_s = [length for lengths in lengths_s.values() for length in lengths]
    last_edge = min(LAST_EDGE_S, max(_FIRST_LAST_EDGE_S, math.ceil(max(all_s, default=0.0))))
    edges = np.arange(last_edge + 1, dtype=np.float64)
    counts, _ = np.histogram(np.minimum(all_s, last_edge), edges)
    return DatasetHealth(
        num_clips=len(all_s),
        minutes=sum(all_s) / 60,
        speakers=tuple(_speaker_health(n, lengths_s[n]) for n in sorted(lengths_s)),
        edges_s=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
    )


def _speaker_health(speaker: int, lengths_s: list[float]) -> SpeakerHealth:
    minutes = sum(lengths_s) / 60
    readiness = (
        Readiness.TOO_LITTLE
        if minutes < FIRST_TRY_MIN
        else Readiness.FIRST_TRY
        if minutes < READY_MIN
        else Readiness.READY
        if minutes <= PLENTY_MIN
        else Readiness.PLENTY
    )
    # Rounded towards what is not there yet, so that "10.0 minutes" never asks for 0.0 more.
    shown = f"Speaker {speaker} has {math.floor(minutes * 10) / 10:.1f} minutes"
    missing = f"{math.ceil(round((READY_MIN - minutes) * 10, 6)) / 10:.1f}"
    wanted = f"{READY_MIN:g} to {PLENTY_MIN:g}"
    sentence = {
        Readiness.TOO_LITTLE: f"{shown}: too little for a voice; record {missing} minutes more"
        f" ({wanted} are best).",
        Readiness.FIRST_TRY: f"{shown}: enough for a first try; {missing} minutes more will make"
        f" it a good deal better ({wanted} are best).",
        Readiness.READY: f"{shown}: ready to train ({wanted} are best).",
        Readiness.PLENTY: f"{shown}: plenty; check the texts rather than record more.",
    }[readiness]
    return SpeakerHealth(speaker, len(lengths_s), minutes, readiness, sentence)
