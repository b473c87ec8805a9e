"""The flags that a clip of a dataset can carry, and what decides them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from csm_studio.audio.quality import ClipMeasures
from csm_studio.constants import MAX_CONTEXT_FRAMES


class Severity(str, Enum):
    """How much a flag matters."""

    ERROR = "error"  # cannot be trained on
    WARNING = "warning"  # spoils the voice
    NOTE = "note"  # worth a listen


class FlagKey(str, Enum):
    """The kinds of flags."""

    EMPTY_TEXT = "empty_text"
    NO_SPEECH = "no_speech"
    TOO_LONG = "too_long"
    TOO_SHORT = "too_short"
    CLIPPING = "clipping"
    CUT_OFF_START = "cut_off_start"
    CUT_OFF_END = "cut_off_end"
    SILENCE_ENDS = "silence_ends"
    SILENCE_INSIDE = "silence_inside"
    LOUD = "loud"
    QUIET = "quiet"
    LOW_BANDWIDTH = "low_bandwidth"
    RESAMPLED = "resampled"
    ODD_TEXT = "odd_text"
    FAST = "fast"
    SLOW = "slow"
    DUPLICATE_AUDIO = "duplicate_audio"
    DUPLICATE_TEXT = "duplicate_text"


_KINDS = {
    FlagKey.EMPTY_TEXT: ("No text", Severity.ERROR),
    FlagKey.NO_SPEECH: ("No speech", Severity.ERROR),
    FlagKey.TOO_LONG: ("Too long", Severity.ERROR),
    FlagKey.TOO_SHORT: ("Too short", Severity.WARNING),
    FlagKey.CLIPPING: ("Clipping", Severity.WARNING),
    FlagKey.CUT_OFF_START: ("First word cut off", Severity.WARNING),
    FlagKey.CUT_OFF_END: ("Last word cut off", Severity.WARNING),
    FlagKey.SILENCE_ENDS: ("Silence at the ends", Severity.WARNING),
    FlagKey.SILENCE_INSIDE: ("Long pause", Severity.WARNING),
    FlagKey.LOUD: ("Loud", Severity.NOTE),
    FlagKey.QUIET: ("Quiet", Severity.NOTE),
    FlagKey.LOW_BANDWIDTH: ("Muffled", Severity.NOTE),
    FlagKey.RESAMPLED: ("Low sample rate", Severity.NOTE),
    FlagKey.ODD_TEXT: ("Odd text", Severity.WARNING),
    FlagKey.FAST: ("Text too long?", Severity.WARNING),
    FlagKey.SLOW: ("Text too short?", Severity.WARNING),
    FlagKey.DUPLICATE_AUDIO: ("Same recording", Severity.WARNING),
    FlagKey.DUPLICATE_TEXT: ("Same text and length", Severity.NOTE),
}


@dataclass(frozen=True)
class Flag:
    """One thing to look at.

    Attributes:
        key: Its kind.
        explanation: One sentence: what was found, with its figure, and what to do.
    """

    key: FlagKey
    explanation: str

    @property
    def title(self) -> str:
        """Two or three words for a chip."""
        return _KINDS[self.key][0]

    @property
    def severity(self) -> Severity:
        """How much it matters."""
        return _KINDS[self.key][1]


@dataclass(frozen=True)
class CheckedClip:
    """What the checks look at.

    Attributes:
        id: Names the row.
        text: The transcript.
        speaker: Who speaks, >= 0.
        measures: From `csm_studio.audio.quality.measure`.
        audio_hash: Hash of the recording, where known.
        num_text_tokens: Ids of the text as CSM reads it, markers included.
    """

    id: str
    text: str
    speaker: int
    measures: ClipMeasures
    audio_hash: str | None
    num_text_tokens: int


@dataclass(frozen=True)
class Limits:
    """What is still accepted without a flag.

    Attributes:
        context_frames: Positions of the model for text, audio and the end-of-speech frame.
        shortest_s: Shortest clip.
        num_clipped: Clipped samples.
        silence_at_end_s: Silence at either end.
        silence_inside_s: Pause inside.
        loudness_off_lu: Distance from the speaker's median loudness.
        bandwidth_hz: Lowest bandwidth.
        rate_deviations: Robust standard deviations from the speaker's median speaking rate.
        same_length_s: Difference in length of two clips of the same text that are two clips.
    """

    context_frames: int = MAX_CONTEXT_FRAMES
    shortest_s: float = 1.0
    num_clipped: int = 10
    silence_at_end_s: float = 0.5
    silence_inside_s: float = 1.0
    loudness_off_lu: float = 6.0
    bandwidth_hz: float = 7_000.0
    rate_deviations: float = 3.5
    same_length_s: float = 0.05
