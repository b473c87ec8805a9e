"""What is wrong, or may be wrong, with the clips of a dataset, in plain words."""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

import numpy as np

from csm_studio.audio.quality import ClipMeasures
from csm_studio.constants import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from csm_studio.dataset.flags import CheckedClip, Flag, FlagKey, Limits, Severity

MIN_CLIPS_FOR_LOUDNESS = 5
"""Clips that a speaker needs for "loud" and "quiet" to mean something."""

MIN_CLIPS_FOR_RATE = 8
"""Clips that a speaker needs for a speaking rate to be out of line."""

_KNOWN_KINDS = frozenset({"Pd", "Pi", "Pf", "Zs"})  # dashes, curly quotes, spaces
_KNOWN_SYMBOLS = frozenset(".,!?;:'\"()…‚„¡¿。，、？！：；「」『』،؟؛।॥·\u200c\u200d")  # noqa: RUF001
_MIN_LETTERS_IN_CAPITALS = 6  # shorter ones are often abbreviations, which are spelt like that
_BAND_OF_RATE = 0.8  # resamplers leave about this share of half the rate
_SIGMA_PER_MAD = 1.4826
_STEADIEST_RATE = 0.08  # a speaker's rate spreads by this share at least
_MAX_NAMED = 3


def check_clips(
    rows: Sequence[CheckedClip], limits: Limits | None = None
) -> dict[str, tuple[Flag, ...]]:
    """Check clips one by one and against each other.

    Args:
        rows: The clips; ids are unique.
        limits: What is still accepted; the defaults if left out.

    Returns:
        Flags by id, an entry for every row, gravest first.
    """
    limits = limits or Limits()
    flags: dict[str, list[Flag]] = {row.id: [] for row in rows}
    for row in rows:
        flags[row.id] += [*_audio_flags(row, limits), *_text_flags(row)]
    by_speaker: defaultdict[int, list[CheckedClip]] = defaultdict(list)
    for row in rows:
        if row.measures.has_speech:
            by_speaker[row.speaker].append(row)
    for spoken in by_speaker.values():
        for found in (_loudness_flags(spoken, limits), _rate_flags(spoken, limits)):
            for row_id, flag in found.items():
                flags[row_id].append(flag)
    for row_id, flag in _duplicate_flags(rows, limits).items():
        flags[row_id].append(flag)
    order = {severity: index for index, severity in enumerate(Severity)}
    return {
        row_id: tuple(sorted(found, key=lambda flag: order[flag.severity]))
        for row_id, found in flags.items()
    }


def _audio_flags(row: CheckedClip, limits: Limits) -> Iterable[Flag]:
    measures = row.measures
    yield from _length_flags(row, limits)
    if not measures.has_speech:
        yield Flag(
            FlagKey.NO_SPEECH,
            f"Nothing rises above the noise at {measures.noise_floor_dbfs:.0f} dBFS;"
            " remove the clip or record it again.",
        )
    if measures.num_clipped > limits.num_clipped:
        yield Flag(
            FlagKey.CLIPPING,
            f"{measures.num_clipped} samples are cut off at full scale, which sounds harsh;"
            " record it again with less gain, or remove it.",
        )
    if measures.starts_abruptly:
        yield Flag(
            FlagKey.CUT_OFF_START,
            "Speech is already under way in the first 30 ms; move the start of the clip"
            " back, or take the half word out of the text and the audio.",
        )
    if measures.ends_abruptly:
        yield Flag(
            FlagKey.CUT_OFF_END,
            "Speech is still going on in the last 30 ms; move the end of the clip on, or"
            " take the half word out of the text and the audio.",
        )
    start_s, end_s = measures.silence_start_s, measures.silence_end_s
    if max(start_s, end_s) > limits.silence_at_end_s:
        yield Flag(
            FlagKey.SILENCE_ENDS,
            f"{start_s:.1f} s of silence before the speech and {end_s:.1f} s after it;"
            " trim the ends.",
        )
    if measures.silence_inside_s > limits.silence_inside_s:
        yield Flag(
            FlagKey.SILENCE_INSIDE,
            f"A pause of {measures.silence_inside_s:.1f} s inside; split the clip there.",
        )
    yield from _rate_and_band_flags(measures, limits)


def _length_flags(row: CheckedClip, limits: Limits) -> Iterable[Flag]:
    duration_s = row.measures.duration_s
    num_audio = -(-round(duration_s * SAMPLE_RATE_HZ) // SAMPLES_PER_FRAME)
    num_frames = row.num_text_tokens + num_audio + 1
    if num_frames > limits.context_frames:
        room = max(0, limits.context_frames - row.num_text_tokens - 1)
        longest_s = room * SAMPLES_PER_FRAME / SAMPLE_RATE_HZ
        yield Flag(
            FlagKey.TOO_LONG,
            f"{duration_s:.1f} s with its text need {num_frames} of the model's"
            f" {limits.context_frames} frames; split it into clips under {longest_s:.1f} s.",
        )
    if duration_s < limits.shortest_s:
        yield Flag(
            FlagKey.TOO_SHORT,
            f"{duration_s:.2f} s are too little to learn from (at least {limits.shortest_s:g} s);"
            " join it with its neighbour or remove it.",
        )


def _rate_and_band_flags(measures: ClipMeasures, limits: Limits) -> Iterable[Flag]:
    rate_hz = measures.original_rate_hz
    if rate_hz < SAMPLE_RATE_HZ:
        yield Flag(
            FlagKey.RESAMPLED,
            f"The file has {rate_hz} Hz, less than the model's {SAMPLE_RATE_HZ} Hz, so the voice"
            " will sound duller; use the original recording if there is a better one.",
        )
    explained_by_rate = measures.bandwidth_hz >= _BAND_OF_RATE * rate_hz / 2
    if (
        measures.has_speech
        and measures.bandwidth_hz < limits.bandwidth_hz
        and not explained_by_rate
    ):
        yield Flag(
            FlagKey.LOW_BANDWIDTH,
            f"Nothing above {measures.bandwidth_hz / 1_000:.1f} kHz although the file could hold"
            " more, as after a telephone line or strong compression; use a better source if there"
            " is one.",
        )


def _text_flags(row: CheckedClip) -> Iterable[Flag]:
    if not row.text.strip():
        yield Flag(FlagKey.EMPTY_TEXT, "The text is empty; write what is said or remove the clip.")
        return
    unique = list(dict.fromkeys(unicodedata.normalize("NFC", row.text)))
    digits = [letter for letter in unique if unicodedata.category(letter)[0] == "N"]
    unknown = [
        letter
        for letter in unique
        if letter not in _KNOWN_SYMBOLS
        and (kind := unicodedata.category(letter)) not in _KNOWN_KINDS
        and kind[0] not in "LMN"
    ]
    found = []
    if digits:
        found.append(f"has digits ({' '.join(digits)})")
    if unknown:
        found.append(f"has unknown symbols ({' '.join(map(_shown, unknown))})")
    if row.text.isupper() and sum(map(str.isalpha, row.text)) >= _MIN_LETTERS_IN_CAPITALS:
        found.append("is all in capitals")
    if found:
        yield Flag(
            FlagKey.ODD_TEXT,
            f"The text {' and '.join(found)}; write it in plain words, as it is spoken.",
        )


def _shown(letter: str) -> str:
    return letter if letter.isprintable() else f"U+{ord(letter):04X}"


def _loudness_flags(spoken: Sequence[CheckedClip], limits: Limits) -> Mapping[str, Flag]:
    if len(spoken) < MIN_CLIPS_FOR_LOUDNESS:
        return {}
    usual = float(np.median([row.measures.loudness_lufs for row in spoken]))
    flags = {}
    for row in spoken:
        off_lu = row.measures.loudness_lufs - usual
        if abs(off_lu) > limits.loudness_off_lu:
            key, word = (FlagKey.LOUD, "louder") if off_lu > 0 else (FlagKey.QUIET, "quieter")
            flags[row.id] = Flag(
                key,
                f"{abs(off_lu):.1f} LU {word} than this speaker's usual {usual:.1f} LUFS;"
                " normalise the loudness, and listen whether the voice still sounds the same.",
            )
    return flags


def _rate_flags(spoken: Sequence[CheckedClip], limits: Limits) -> Mapping[str, Flag]:
    rates = {row.id: rate for row in spoken if (rate := _letters_per_s(row))}
    if len(rates) < MIN_CLIPS_FOR_RATE:
        return {}
    values = np.array(list(rates.values()))
    usual = float(np.median(values))
    spread = _SIGMA_PER_MAD * float(np.median(np.abs(values - usual)))
    allowed = limits.rate_deviations * max(spread, _STEADIEST_RATE * usual)
    flags = {}
    for row_id, rate in rates.items():
        if abs(rate - usual) > allowed:
            key, doubt = (
                (FlagKey.FAST, "holds words that are not said")
                if rate > usual
                else (FlagKey.SLOW, "lacks words that are said")
            )
            flags[row_id] = Flag(
                key,
                f"{rate:.0f} letters per second, where this speaker has {usual:.0f};"
                f" listen whether the text {doubt}.",
            )
    return flags


def _letters_per_s(row: CheckedClip) -> float | None:
    measures = row.measures
    spoken_s = measures.duration_s - measures.silence_start_s - measures.silence_end_s
    num_letters = sum(map(str.isalnum, row.text))
    return num_letters / spoken_s if num_letters and spoken_s > 0 else None


def _duplicate_flags(rows: Sequence[CheckedClip], limits: Limits) -> Mapping[str, Flag]:
    flags: dict[str, Flag] = {}
    for same in _grouped(rows, lambda row: row.audio_hash):
        for row in same:
            flags[row.id] = Flag(
                FlagKey.DUPLICATE_AUDIO,
                f"The same recording as {_named(row, same, 0, len(same))}; keep one of them.",
            )
    for same in _grouped(rows, _plain_text):
        same.sort(key=lambda row: row.measures.duration_s)
        lengths_s = [row.measures.duration_s for row in same]
        for row, length_s in zip(same, lengths_s, strict=True):
            first = bisect_left(lengths_s, length_s - limits.same_length_s)
            end = bisect_right(lengths_s, length_s + limits.same_length_s)
            if end - first > 1 and row.id not in flags:
                flags[row.id] = Flag(
                    FlagKey.DUPLICATE_TEXT,
                    f"The same text and length as {_named(row, same, first, end)}; listen, and keep"
                    " one of them if they are one recording.",
                )
    return flags


def _grouped(
    rows: Sequence[CheckedClip], key: Callable[[CheckedClip], str | None]
) -> list[list[CheckedClip]]:
    """Return the groups of two or more rows of the same key; no key, no group."""
    groups: defaultdict[str, list[CheckedClip]] = defaultdict(list)
    for row in rows:
        if name := key(row):
            groups[name].append(row)
    return [group for group in groups.values() if len(group) > 1]


def _plain_text(row: CheckedClip) -> str:
    return "".join(letter for letter in row.text.casefold() if letter.isalnum())


def _named(row: CheckedClip, group: Sequence[CheckedClip], first: int, end: int) -> str:
    """Name the rows first to end of a group, without the row itself; a few, then a count."""
    others = [other.id for other in islice(group, first, min(end, first + _MAX_NAMED + 1))]
    others = [name for name in others if name != row.id][:_MAX_NAMED]
    more = end - first - 1 - len(others)
    return ", ".join(others) + (f" and {more} more" if more > 0 else "")
