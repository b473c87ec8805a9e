"""The bundled demo voice: complete, small, and able to learn from the sample voice."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from csm_studio.audio.io import read_audio
from csm_studio.dataset.importers import find_clips
from csm_studio.dataset.records import Dataset
from csm_studio.generation.generator import generate_speech
from csm_studio.generation.streaming import stream_generate
from csm_studio.model_folder import load_model
from csm_studio.models.csm import CSM
from csm_studio.training import events
from csm_studio.training.config import LoRAOptions
from csm_studio.training.prepare import prepare_data, prepare_model
from csm_studio.training.trainer import Trainer

ASSETS = Path(__file__).parent.parent / "assets"
MAX_BYTES = 40_000_000


@pytest.fixture
def voice() -> CSM:
    return load_model("demo")


def test_folder_is_small_and_says_what_it_is() -> None:
    files = list((ASSETS / "demo_voice").iterdir())
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    described = json.loads((ASSETS / "demo_voice/config.json").read_text())
    assert "not CSM-1B" in described["description"]


def test_codec_hears_the_sample_voice(voice: CSM) -> None:
    """The reconstruction keeps the course of loudness: the codec passes speech on."""
    assert voice.companions is not None
    codec = voice.companions.codec
    correlations = []
    for path in sorted((ASSETS / "sample_voice/wavs").glob("*.flac"))[:6]:
        audio = read_audio(path)
        audio = audio[: audio.size // 1920 * 1920]
        decoded = np.array(codec.decode(codec.encode(mx.array(audio)[None]))[0])
        loudness = [
            np.log(np.sqrt((signal.reshape(-1, 480) ** 2).mean(axis=1)) + 1e-3)
            for signal in (audio, decoded)
        ]
        correlations.append(np.corrcoef(*loudness)[0, 1])
    assert np.mean(correlations) > 0.8


def test_speech_ends_and_streams(voice: CSM) -> None:
    whole = generate_speech(voice, "Hello there.", 0, max_audio_length_ms=8_000, seed=3)
    assert np.abs(whole.audio).max() > 0.01
    stream = stream_generate(voice, "Hello there.", 0, max_audio_length_ms=8_000, seed=3)
    streamed = np.concatenate(list(stream))
    assert stream.num_frames == whole.num_frames
    np.testing.assert_allclose(streamed, whole.audio, atol=1e-4)


def test_training_loss_falls_on_the_sample_voice(voice: CSM, tmp_path: Path) -> None:
    clips = find_clips(ASSETS / "sample_voice", max_samples=18).clips
    options = LoRAOptions(
        data_path=Path("unused.json"),
        output_dir=tmp_path / "run",
        cache_dir=tmp_path / "codes",
        epochs=3,
        learning_rate=2e-3,
        depth_frame_ratio=0.25,
        val_split=0.1,
        save_every=0,
    )
    assert voice.companions is not None
    dataset = Dataset(None, tuple((clip,) for clip in clips))
    data = prepare_data(dataset, voice.companions, options)
    seen: list[events.Event] = []
    Trainer(prepare_model(voice, options), data, options, seen.append).run()
    losses = [event.loss for event in seen if isinstance(event, events.StepDone)]
    validations = [event.loss for event in seen if isinstance(event, events.Validated)]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.1
    assert validations[-1] < validations[0]
