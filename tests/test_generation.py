"""Sampling, prompts, the frame loop and streaming, on tiny random models."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import csm_studio
from csm_studio.audio.io import write_wav
from csm_studio.configs import CSMConfig, MimiConfig
from csm_studio.constants import SAMPLES_PER_FRAME
from csm_studio.errors import ConfigError, CsmStudioError, GenerationError, OptionError
from csm_studio.generation import frames as frames_module
from csm_studio.generation.frames import FrameLoop
from csm_studio.generation.generator import generate, generate_speech
from csm_studio.generation.prompt import Prompt, Segment, build_prompt
from csm_studio.generation.sampling import filter_logits, sample
from csm_studio.generation.settings import SamplingOptions
from csm_studio.generation.streaming import stream_generate
from csm_studio.models.csm import CSM
from tests.conftest import load_arrays
from tests.tiny_voice import make_voice

FOUR_FRAMES_MS = 320


@pytest.fixture
def voice(tiny_csm_config: CSMConfig, tiny_mimi_config: MimiConfig) -> CSM:
    return make_voice(tiny_csm_config, tiny_mimi_config)


def script(monkeypatch: pytest.MonkeyPatch, frames: list[list[int]]) -> None:
    """Make the sampler draw the codes of given frames, then frames of ones."""

    def codes() -> Iterator[int]:
        for frame in frames:
            yield from frame
        while True:
            yield 1

    drawn = codes()
    monkeypatch.setattr(frames_module, "sample", lambda *_: mx.array([next(drawn)]))


# --- sampling ---------------------------------------------------------------------------------


def reference_support(logits: np.ndarray, options: SamplingOptions) -> np.ndarray:
    """Which codes may be drawn, straight from the definitions."""
    scaled = logits.astype(np.float64) / options.temperature
    kept = np.ones(len(scaled), bool)
    if options.top_k:
        kept[np.argsort(-scaled)[options.top_k :]] = False

    def probabilities() -> np.ndarray:
        weights = np.where(kept, np.exp(scaled - scaled.max()), 0)
        return weights / weights.sum()

    if options.top_p < 1:
        order = np.argsort(-probabilities())
        count = int(np.searchsorted(np.cumsum(probabilities()[order]), options.top_p)) + 1
        kept[order[count:]] = False
    if options.min_p > 0:
        kept &= probabilities() >= options.min_p * probabilities().max()
    return kept


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5},
        {"top_k": 0},
        {"top_k": 1000},
        {"top_k": 0, "top_p": 0.5},
        {"top_k": 0, "min_p": 0.2},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7},
        {"top_k": 3, "top_p": 0.01},
    ],
)
def test_filters_keep_what_the_definitions_keep(settings: dict[str, Any]) -> None:
    options = SamplingOptions(**settings)
    logits = np.random.default_rng(0).normal(size=(6, 67)).astype(np.float32) * 3
    filtered = np.array(filter_logits(mx.array(logits), options))
    for row, kept in zip(logits, filtered, strict=True):
        expected = reference_support(row, options)
        assert (np.isfinite(kept) == expected).all()
        np.testing.assert_allclose(kept[expected], row[expected] / options.temperature, rtol=1e-6)


def test_draws_follow_the_probabilities() -> None:
    probabilities = np.array([0.5, 0.25, 0.125, 0.125])
    logits = mx.broadcast_to(mx.array(np.log(probabilities).astype(np.float32)), (20_000, 4))
    options = SamplingOptions(temperature=1.0, top_k=3)
    drawn = np.bincount(np.array(sample(logits, options, mx.random.key(1))), minlength=4)
    # The last two tie, so top-k 3 keeps both.
    np.testing.assert_allclose(drawn / 20_000, probabilities, atol=0.02)


def test_temperature_0_takes_the_likeliest() -> None:
    logits = mx.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert sample(logits, SamplingOptions(temperature=0), mx.random.key(0)).tolist() == [1, 0]


def test_half_precision_logits_are_drawn_as_float32() -> None:
    logits = mx.random.normal((4, 50), key=mx.random.key(2)).astype(mx.bfloat16)
    options, key = SamplingOptions(top_p=0.9), mx.random.key(3)
    assert sample(logits, options, key).tolist() == (
        sample(logits.astype(mx.float32), options, key).tolist()
    )


# --- prompts ----------------------------------------------------------------------------------


def test_prompt_is_text_audio_and_end_for_each_turn_then_the_text(voice: CSM) -> None:
    assert voice.companions is not None
    # 2.5 frames: filled up with silence to 3.
    audio = np.random.default_rng(0).normal(size=4800).astype(np.float32) * 0.1
    context = [Segment(1, "Hi.", audio)]
    prompt = build_prompt("Yes?", 0, context, voice.companions, 4)
    tokens, mask = np.array(prompt.tokens)[0], np.array(prompt.mask)[0]
    turn = voice.companions.tokenizer.encode_segment("Hi.", 1)
    text = voice.companions.tokenizer.encode_segment("Yes?", 0)
    assert prompt.num_frames == len(turn) + 3 + 1 + len(text)
    is_text = np.repeat([True, False, True], [len(turn), 4, len(text)])
    assert (mask[:, 4] == is_text).all()
    assert (mask[:, :4] == ~is_text[:, None]).all()
    assert tokens[is_text, 4].tolist() == turn + text
    whole = np.pad(audio, (0, 3 * SAMPLES_PER_FRAME - audio.size))
    codes = np.array(voice.companions.codec.encode(mx.array(whole)[None]))[0].T
    assert (tokens[~is_text][:3, :4] == codes).all()
    assert (tokens[~is_text][3] == 0).all()
    assert (tokens[~mask] == 0).all()


def test_context_file_and_samples_are_the_same(voice: CSM, tmp_path: Path) -> None:
    assert voice.companions is not None
    path = tmp_path / "turn.wav"
    audio = np.round(np.linspace(-0.5, 0.5, 3000) * 2**15).astype(np.float32) / 2**15
    write_wav(path, audio)
    prompts = [
        build_prompt("x", 0, [segment], voice.companions, 4)
        for segment in (Segment(0, "a", audio), Segment(0, "a", audio_path=path))
    ]
    assert prompts[0].tokens.tolist() == prompts[1].tokens.tolist()


@pytest.mark.parametrize(
    ("segment", "expected"),
    [
        (Segment(0, "a"), "context turn 1 .*no audio"),
        (Segment(0, "a", np.zeros(9), "b.wav"), "both audio and audio_path"),
        (Segment(0, "a", np.zeros((2, 9))), r"shape \(2, 9\)"),
        (Segment(0, "a", np.full(9, np.nan)), "finite samples"),
        (Segment(0, "a", audio_path="no_such.wav"), "no_such.wav: not found"),
        (Segment(0, " ", np.zeros(9)), "nothing to say"),
    ],
)
def test_refused_context(voice: CSM, segment: Segment, expected: str) -> None:
    with pytest.raises(CsmStudioError, match=expected):
        generate(voice, "Hello.", 0, [segment])


def test_context_changes_the_speech(voice: CSM) -> None:
    context = [Segment(1, "Hi.", np.sin(np.arange(4000) / 20))]
    settings: dict[str, Any] = {"max_audio_length_ms": FOUR_FRAMES_MS, "seed": 0}
    with_context = generate_speech(voice, "Yes?", 0, context, **settings)
    without = generate_speech(voice, "Yes?", 0, **settings)
    assert not np.array_equal(with_context.audio, without.audio)


# --- frames -----------------------------------------------------------------------------------


def test_greedy_frames_equal_the_official_code(parity_dir: Path) -> None:
    folder = parity_dir / "csm_tiny4"
    config = CSMConfig.from_dict(json.loads((folder / "config.json").read_text()))
    model = CSM(config).load_weights(folder / "sesame/model.safetensors")
    io = load_arrays(folder / "io.safetensors")
    prompt = Prompt(io["tokens"], io["tokens_mask"])
    loop = FrameLoop(model, prompt, SamplingOptions(temperature=0), seed=0)
    for expected in np.array(io["greedy_frames"]):
        loop.enqueue()
        assert loop.wait().tolist() == expected.tolist()


def test_codes_that_the_codec_lacks_are_never_drawn(voice: CSM) -> None:
    # All 35 entries are equally likely: 40 draws would meet one of the spare ones, 32 to 34.
    num_codes, vocab = 32, voice.config.audio_vocab_size
    voice.codebook0_head.weight = mx.zeros_like(voice.codebook0_head.weight)
    voice.audio_head = mx.zeros_like(voice.audio_head)
    stream = stream_generate(voice, "Hello.", 0, max_audio_length_ms=800, top_k=0, seed=3)
    drawn = []
    wait = stream._loop.wait

    def spy() -> np.ndarray:
        drawn.append(wait())
        return drawn[-1]

    stream._loop.wait = spy  # type: ignore[method-assign]
    list(stream)
    assert len(drawn) == 10
    assert np.max(drawn) < num_codes < vocab


# --- the whole --------------------------------------------------------------------------------


def test_stream_joined_is_the_offline_speech(voice: CSM) -> None:
    settings: dict[str, Any] = {"max_audio_length_ms": 1600, "seed": 5}
    offline = generate_speech(voice, "Hello.", 0, **settings)
    assert voice.companions is not None
    assert np.abs(offline.audio).max() > 1e-3
    for chunk_frames in (1, 3):
        stream = stream_generate(voice, "Hello.", 0, chunk_frames=chunk_frames, **settings)
        chunks = list(stream)
        assert all(chunk.dtype == np.float32 for chunk in chunks)
        assert [chunk.size for chunk in chunks[:-1]] == (
            [chunk_frames * SAMPLES_PER_FRAME] * (len(chunks) - 1)
        )
        np.testing.assert_allclose(np.concatenate(chunks), offline.audio, atol=1e-5)
        assert stream.num_frames == offline.num_frames == 20


def test_stream_is_the_decoded_frames(voice: CSM, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [[3, 1, 4, 1], [0, 0, 0, 2], [5, 9, 2, 6]]
    script(monkeypatch, [*frames, [0, 0, 0, 0]])
    speech = generate_speech(voice, "Hello.", 0)
    assert voice.companions is not None
    expected = voice.companions.codec.decode(mx.array(frames).T[None])[0]
    np.testing.assert_allclose(speech.audio, np.array(expected), atol=1e-5)


def test_seed_decides_whatever_ran_before_and_on_any_thread(voice: CSM) -> None:
    def speak(seed: int) -> np.ndarray:
        audio = generate(voice, "Hello.", 0, max_audio_length_ms=FOUR_FRAMES_MS, seed=seed)
        return np.array(audio)

    first = speak(1)
    mx.random.seed(99)
    mx.eval(mx.random.normal((3,)))
    assert np.array_equal(speak(1), first)
    assert not np.array_equal(speak(2), first)
    elsewhere: list[np.ndarray] = []

    def work() -> None:
        elsewhere.append(speak(1))
        mx.clear_streams()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert np.array_equal(elsewhere[0], first)


def test_drawn_seed_is_reported_and_gives_the_same_again(voice: CSM) -> None:
    drawn = generate_speech(voice, "Hello.", 0, max_audio_length_ms=FOUR_FRAMES_MS)
    again = generate_speech(voice, "Hello.", 0, max_audio_length_ms=FOUR_FRAMES_MS, seed=drawn.seed)
    assert np.array_equal(drawn.audio, again.audio)


def test_end_frame_stops_and_is_not_heard(voice: CSM, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [[1, 2, 3, 4], [0, 0, 0, 7], [7, 0, 0, 0], [0, 0, 0, 0]])
    speech = generate_speech(voice, "Hello.", 0, max_audio_length_ms=10_000)
    assert speech.num_frames == 3
    assert speech.audio.size == 3 * SAMPLES_PER_FRAME
    assert speech.ended_by_itself


def test_end_at_once_is_an_error_with_advice(voice: CSM, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [[0, 0, 0, 0]])
    with pytest.raises(GenerationError, match=r"before it began \(seed 8\)\. Try another seed"):
        generate(voice, "Hello.", 0, seed=8)


def test_length_limit_counts_whole_frames_and_is_told(voice: CSM) -> None:
    seen: list[tuple[int, int]] = []
    speech = generate_speech(
        voice,
        "Hello.",
        0,
        max_audio_length_ms=319,
        seed=0,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert speech.num_frames == 3
    assert not speech.ended_by_itself
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_nothing_is_computed_past_the_limit(voice: CSM, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[None] = []
    enqueue = FrameLoop.enqueue

    def counting(self: FrameLoop) -> None:
        begun.append(None)
        enqueue(self)

    monkeypatch.setattr(FrameLoop, "enqueue", counting)
    generate(voice, "Hello.", 0, max_audio_length_ms=FOUR_FRAMES_MS, seed=0)
    assert len(begun) == 4


def test_closed_stream_stops(voice: CSM) -> None:
    stream = stream_generate(voice, "Hello.", 0, chunk_frames=1, seed=0)
    next(stream)
    stream.close()
    assert list(stream) == []
    assert stream.num_frames == 1


def test_prompt_and_speech_must_fit_the_context(voice: CSM) -> None:
    assert voice.companions is not None
    num_text = len(voice.companions.tokenizer.encode_segment("Hello.", 0))
    room = voice.config.backbone.max_position_embeddings - num_text
    with pytest.raises(GenerationError) as caught:
        stream_generate(voice, "Hello.", 0, max_audio_length_ms=room * 80)
    assert f"prompt takes {num_text} positions" in str(caught.value)
    assert f"at most {(room - 1) * 80} ms" in str(caught.value)
    stream_generate(voice, "Hello.", 0, max_audio_length_ms=(room - 1) * 80)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_audio_length_ms": 79}, "at least 80"),
        ({"max_audio_length_ms": float("nan")}, "at least 80"),
        ({"temperature": -1}, "--temperature is -1"),
        ({"temperature": float("nan")}, "finite"),
        ({"top_p": 0}, "--top-p is 0"),
        ({"top_k": -1}, "--top-k is -1"),
        ({"seed": -1}, "--seed is -1"),
        ({"chunk_frames": 0}, "chunk_frames is 0"),
    ],
)
def test_settings_out_of_bounds(voice: CSM, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        stream_generate(voice, "Hello.", 0, **settings)


def test_codec_and_tokenizer_may_be_given(voice: CSM) -> None:
    own = voice.companions
    assert own is not None
    settings: dict[str, Any] = {"max_audio_length_ms": FOUR_FRAMES_MS, "seed": 0}
    expected = generate_speech(voice, "Hello.", 0, **settings)
    voice.companions = None
    with pytest.raises(ConfigError, match="audio_num_codebooks 4; the public codec"):
        generate(voice, "Hello.", 0)
    given = generate_speech(
        voice, "Hello.", 0, codec=own.codec, tokenizer=own.tokenizer, **settings
    )
    assert np.array_equal(given.audio, expected.audio)


def test_public_names_are_there_and_lazy() -> None:
    for name in csm_studio.__all__:
        assert getattr(csm_studio, name) is not None
    assert csm_studio.generate is generate
    with pytest.raises(AttributeError, match="no_such"):
        csm_studio.no_such  # noqa: B018
