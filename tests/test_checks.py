"""Each check finds what it is for, says so with its figure, and leaves a good clip alone."""

from __future__ import annotations

import dataclasses
import itertools
import time

import numpy as np
import pytest

from csm_studio.audio.quality import ClipMeasures
from csm_studio.dataset.checks import check_clips
from csm_studio.dataset.flags import CheckedClip, Flag, FlagKey, Limits, Severity
from csm_studio.dataset.health import Readiness, health

GOOD = ClipMeasures(
    duration_s=5.0,
    original_rate_hz=48_000,
    original_channels=1,
    peak_dbfs=-6.0,
    loudness_lufs=-23.0,
    num_clipped=0,
    has_speech=True,
    silence_start_s=0.1,
    silence_end_s=0.1,
    silence_inside_s=0.3,
    speech_dbfs=-20.0,
    noise_floor_dbfs=-65.0,
    bandwidth_hz=11_800.0,
    starts_abruptly=False,
    ends_abruptly=False,
)
SENTENCE = "The quick brown fox, it's said, jumps over the lazy dog - and doesn't look back!"


def clip(
    name: str = "a", text: str = SENTENCE, speaker: int = 0, **measures: object
) -> CheckedClip:
    return CheckedClip(
        id=name,
        text=text,
        speaker=speaker,
        measures=dataclasses.replace(GOOD, **measures),  # type: ignore[arg-type]
        audio_hash=None,
        num_text_tokens=20,
    )


def only_flag(row: CheckedClip, limits: Limits | None = None) -> Flag:
    (flag,) = check_clips([row], limits)[row.id]
    return flag


def keys(flags: tuple[Flag, ...]) -> list[FlagKey]:
    return [flag.key for flag in flags]


def test_a_good_clip_has_no_flags() -> None:
    assert check_clips([clip()]) == {"a": ()}
    assert check_clips([]) == {}


@pytest.mark.parametrize(
    ("key", "figure", "measures"),
    [
        (FlagKey.CLIPPING, "137 samples", {"num_clipped": 137}),
        (FlagKey.SILENCE_ENDS, "0.9 s of silence before", {"silence_start_s": 0.9}),
        (FlagKey.SILENCE_ENDS, "1.2 s after", {"silence_end_s": 1.2}),
        (FlagKey.SILENCE_INSIDE, "1.7 s", {"silence_inside_s": 1.7}),
        (FlagKey.TOO_SHORT, "0.62 s", {"duration_s": 0.62}),
        (FlagKey.CUT_OFF_START, "30 ms", {"starts_abruptly": True}),
        (FlagKey.CUT_OFF_END, "30 ms", {"ends_abruptly": True}),
        (FlagKey.LOW_BANDWIDTH, "3.9 kHz", {"bandwidth_hz": 3_900.0}),
        (FlagKey.RESAMPLED, "16000 Hz", {"original_rate_hz": 16_000, "bandwidth_hz": 7_900.0}),
        (FlagKey.RESAMPLED, "8000 Hz", {"original_rate_hz": 8_000, "bandwidth_hz": 3_900.0}),
        (FlagKey.NO_SPEECH, "-65 dBFS", {"has_speech": False}),
    ],
)
def test_sound(key: FlagKey, figure: str, measures: dict[str, object]) -> None:
    flag = only_flag(clip(**measures))
    assert flag.key == key
    assert figure in flag.explanation


def test_a_narrow_file_of_a_low_rate_has_both_flags() -> None:
    row = clip(original_rate_hz=16_000, bandwidth_hz=3_900.0)
    assert set(keys(check_clips([row])["a"])) == {FlagKey.RESAMPLED, FlagKey.LOW_BANDWIDTH}


@pytest.mark.parametrize(
    ("limits", "measures"),
    [
        (Limits(num_clipped=200), {"num_clipped": 137}),
        (Limits(silence_at_end_s=1.0), {"silence_end_s": 0.9}),
        (Limits(silence_inside_s=2.0), {"silence_inside_s": 1.7}),
        (Limits(shortest_s=0.5), {"duration_s": 0.62}),
        (Limits(bandwidth_hz=3_000.0), {"bandwidth_hz": 3_900.0}),
    ],
)
def test_limits_can_be_moved(limits: Limits, measures: dict[str, object]) -> None:
    assert check_clips([clip(**measures)])["a"] != ()
    assert check_clips([clip(**measures)], limits)["a"] == ()


@pytest.mark.parametrize("num_samples", [1_920 * 60, 1_920 * 60 - 1_919, 1_920 * 60 + 1])
def test_length_counts_text_audio_and_end(num_samples: int) -> None:
    num_audio = 60 if num_samples <= 1_920 * 60 else 61
    row = clip(duration_s=num_samples / 24_000)
    needed = 20 + num_audio + 1
    assert check_clips([row], Limits(context_frames=needed))["a"] == ()
    flag = only_flag(row, Limits(context_frames=needed - 1))
    assert flag.key == FlagKey.TOO_LONG
    assert flag.severity == Severity.ERROR
    assert f"need {needed} of" in flag.explanation
    # What it says would fit does fit.
    longest_s = float(flag.explanation.split("under ")[1].split(" s")[0])
    assert longest_s == pytest.approx((num_audio - 1) * 0.08, abs=0.051)


@pytest.mark.parametrize("text", ["", "  \n "])
def test_empty_text(text: str) -> None:
    flag = only_flag(clip(text=text))
    assert flag.key == FlagKey.EMPTY_TEXT
    assert flag.severity == Severity.ERROR


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It costs 25 euros", "digits (2 5)"),
        ("Room ४", "digits (४)"),
        ("Salt & pepper, 50% off", "digits (5 0) and has unknown symbols (& %)"),
        ("write to me@example.org", "unknown symbols (@)"),
        ("zero\u200bwidth", "unknown symbols (U+200B)"),
        ("two\nlines", "unknown symbols (U+000A)"),
        ("good 👍", "unknown symbols (👍)"),
        ("[laughs] no", "unknown symbols ([ ])"),
        ("PLEASE LISTEN TO ME", "all in capitals"),
        ("ПОЖАЛУЙСТА", "all in capitals"),
    ],
)
def test_odd_text_names_what_is_odd(text: str, found: str) -> None:
    flag = only_flag(clip(text=text))
    assert flag.key == FlagKey.ODD_TEXT
    assert found in flag.explanation


@pytest.mark.parametrize(
    "text",
    [
        "“Well,” she said – ‘no’ … (perhaps)",  # noqa: RUF001
        "Wie schön, daß Ihr da seid!",
        "Cafe\u0301, s'il vous plaît\u202f!",
        "¿Qué tal? ¡Bien!",
        "Привет, как дела?",
        "你好，世界。",  # noqa: RUF001
        "नमस्ते, आप कैसे हैं।",
        "مرحبا، كيف حالك؟",
        "O. K.",
        "NASA",
    ],
)
def test_ordinary_text_of_many_languages_is_not_odd(text: str) -> None:
    assert check_clips([clip(text=text)])["a"] == ()


def test_loud_and_quiet_are_told_against_the_same_speaker() -> None:
    mine = [clip(f"mine{n}", loudness_lufs=-23.0 + 0.2 * n, duration_s=n + 4) for n in range(4)]
    others = [clip(f"other{n}", "", 1, loudness_lufs=-35.0, duration_s=n + 4) for n in range(9)]
    loud = clip("loud", speaker=0, loudness_lufs=-12.0, duration_s=9)
    quiet = clip("quiet", speaker=0, loudness_lufs=-36.0, duration_s=11)
    flags = check_clips([*mine, *others, loud, quiet])
    assert keys(flags["loud"]) == [FlagKey.LOUD]
    assert keys(flags["quiet"]) == [FlagKey.QUIET]
    assert "10.7 LU louder" in flags["loud"][0].explanation
    assert "-22.7 LUFS" in flags["loud"][0].explanation
    assert all(flags[row.id] == () for row in mine)
    assert all(keys(flags[row.id]) == [FlagKey.EMPTY_TEXT] for row in others)
    # What holds no speech does not count.
    empty = [clip(f"empty{n}", "none", has_speech=False, loudness_lufs=-70.0) for n in range(9)]
    assert all(check_clips([*mine, *empty])[row.id] == () for row in mine)
    # Four clips have no usual loudness.
    assert not check_clips([*mine[:3], loud])["loud"]


def steady(num_clips: int, seed: int) -> list[CheckedClip]:
    """Clips of one speaker at about 14 letters per second."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(num_clips):
        length_s = float(rng.uniform(3, 10))
        num_letters = round(14 * (length_s - 0.2) * rng.uniform(0.9, 1.1))
        letters = rng.choice(list("abcdefghij"), num_letters)
        rows.append(clip(f"steady{index}", "".join(letters), duration_s=length_s))
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_speaking_rates_out_of_line(seed: int) -> None:
    rows = steady(30, seed)
    fast = clip("fast", "many words " * 16, duration_s=5.2)
    slow = clip("slow", "few words", duration_s=5.2)
    flags = check_clips([*rows, fast, slow])
    assert keys(flags["fast"]) == [FlagKey.FAST]
    assert keys(flags["slow"]) == [FlagKey.SLOW]
    assert "2 letters per second" in flags["slow"][0].explanation
    assert all(flags[row.id] == () for row in rows)
    # Silence at the ends is not spoken.
    patient = clip("patient", "few words", duration_s=5.2, silence_end_s=4.5)
    assert FlagKey.SLOW not in keys(check_clips([*rows, patient])["patient"])
    # Seven clips have no usual rate.
    assert check_clips([*rows[:6], slow])["slow"] == ()


def test_equal_rates_allow_small_differences() -> None:
    rows = [clip(f"r{n}", "a" * 14 * (n + 2), duration_s=n + 2.2) for n in range(20)]
    near = clip("near", "b" * 80, duration_s=5.2)
    assert check_clips([*rows, near])["near"] == ()


def test_the_same_recording_twice() -> None:
    rows = [
        dataclasses.replace(clip(f"r{n}", f"text {'abc'[n]}"), audio_hash="h") for n in range(3)
    ]
    other = dataclasses.replace(clip("other", "else"), audio_hash="g")
    unknown = clip("unknown", "something")
    flags = check_clips([*rows, other, unknown])
    assert [keys(flags[f"r{n}"]) for n in range(3)] == [[FlagKey.DUPLICATE_AUDIO]] * 3
    assert "r0, r2;" in flags["r1"][0].explanation
    assert flags["other"] == flags["unknown"] == ()


def test_the_same_text_and_length() -> None:
    rows = [
        clip("a", "Hello there!", duration_s=2.00),
        clip("b", "hello, there", duration_s=2.04),
        clip("c", "Hello there.", duration_s=2.60),
        clip("d", "Hello you.", duration_s=2.00),
        clip("e", "", duration_s=2.00),
        clip("f", "", duration_s=2.00),
    ]
    flags = check_clips(rows)
    assert keys(flags["a"]) == keys(flags["b"]) == [FlagKey.DUPLICATE_TEXT]
    assert "as b;" in flags["a"][0].explanation
    assert flags["c"] == flags["d"] == ()
    assert keys(flags["e"]) == [FlagKey.EMPTY_TEXT]
    same = [dataclasses.replace(row, audio_hash="h") for row in rows[:2]]
    assert keys(check_clips(same)["a"]) == [FlagKey.DUPLICATE_AUDIO]


def test_many_duplicates_are_counted_not_listed() -> None:
    rows = [dataclasses.replace(clip(f"r{n}"), audio_hash="h") for n in range(10)]
    flags = check_clips(rows)
    assert "r0, r1, r2 and 6 more;" in flags["r9"][0].explanation
    assert "r1, r2, r3 and 6 more;" in flags["r0"][0].explanation


def test_gravest_first_and_each_flag_is_told_in_one_sentence() -> None:
    row = clip("a", "5 &", duration_s=300.0, num_clipped=99, ends_abruptly=True, silence_end_s=3)
    flags = check_clips([row])["a"]
    order = list(Severity)
    ranks = [order.index(flag.severity) for flag in flags]
    assert len(flags) == 5
    assert ranks == sorted(ranks)
    assert flags[0].key == FlagKey.TOO_LONG
    for flag in flags:
        assert flag.title
        assert flag.explanation[-1] == "."
        assert ". " not in flag.explanation


def test_every_kind_has_a_title() -> None:
    titles = {Flag(key, "").title for key in FlagKey}
    assert len(titles) == len(FlagKey)


def test_ten_thousand_rows_are_quick() -> None:
    rng = np.random.default_rng(0)
    rows = [
        dataclasses.replace(
            clip(str(n), "yes", duration_s=float(rng.uniform(1, 3))), audio_hash=str(n % 2)
        )
        for n in range(10_000)
    ]
    before = time.process_time()
    check_clips(rows)
    assert time.process_time() - before < 5.0


def test_health_adds_up() -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        lengths = rng.uniform(0.5, 45, 200)
        rows = [
            clip(str(n), speaker=int(rng.integers(3)), duration_s=float(length))
            for n, length in enumerate(lengths)
        ]
        report = health(rows)
        assert report.num_clips == 200 == sum(report.counts)
        assert report.minutes == pytest.approx(lengths.sum() / 60)
        assert sum(s.minutes for s in report.speakers) == pytest.approx(report.minutes)
        assert [s.speaker for s in report.speakers] == [0, 1, 2]
        assert len(report.edges_s) == len(report.counts) + 1
        bars = zip(itertools.pairwise(report.edges_s), report.counts, strict=True)
        for (low, high), count in bars:
            last = high == report.edges_s[-1]
            assert count == sum(low <= length and (length < high or last) for length in lengths)


def test_health_of_nothing() -> None:
    report = health([])
    assert (report.num_clips, report.minutes, report.speakers) == (0, 0.0, ())
    assert sum(report.counts) == 0


@pytest.mark.parametrize(
    ("minutes", "readiness", "said"),
    [
        (0.5, Readiness.TOO_LITTLE, "9.5 minutes more"),
        (1.99, Readiness.TOO_LITTLE, "8.1 minutes more"),
        (2.0, Readiness.FIRST_TRY, "8.0 minutes more"),
        (9.99, Readiness.FIRST_TRY, "has 9.9 minutes: enough for a first try; 0.1 minutes more"),
        (10.0, Readiness.READY, "has 10.0 minutes: ready"),
        (20.0, Readiness.READY, "ready to train"),
        (20.5, Readiness.PLENTY, "plenty"),
    ],
)
def test_readiness(minutes: float, readiness: Readiness, said: str) -> None:
    (speaker,) = health([clip(duration_s=minutes * 60, speaker=7)]).speakers
    assert speaker.readiness == readiness
    assert said in speaker.sentence
    assert "Speaker 7" in speaker.sentence
