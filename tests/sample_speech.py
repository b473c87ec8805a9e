"""The bundled speech as arrays, and noise to put it into."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from csm_studio.audio.io import read_audio
from csm_studio.audio.process import trim_silence
from csm_studio.constants import SAMPLE_RATE_HZ

WAVS = Path(__file__).parent.parent / "assets" / "sample_voice" / "wavs"


@functools.cache
def sample_clips() -> tuple[np.ndarray, ...]:
    """Every bundled clip, 24 kHz float32 (S,), in order of name."""
    clips = tuple(read_audio(path) for path in sorted(WAVS.glob("*.flac")))
    for clip in clips:
        clip.setflags(write=False)
    return clips


@functools.cache
def tight_clips() -> tuple[np.ndarray, ...]:
    """Every bundled clip without the silence at its ends."""
    return tuple(clip[slice(*trim_silence(clip, pad_s=0.0))] for clip in sample_clips())


def seconds(length_s: float) -> int:
    return round(length_s * SAMPLE_RATE_HZ)


def silence(length_s: float) -> np.ndarray:
    return np.zeros(seconds(length_s), np.float32)


def tone(frequency_hz: float, length_s: float, amplitude: float = 1.0) -> np.ndarray:
    t = np.arange(seconds(length_s)) / SAMPLE_RATE_HZ
    return (amplitude * np.sin(2 * np.pi * frequency_hz * t)).astype(np.float32)


def noise_like(
    audio: np.ndarray, below_db: float, seed: int, reference: np.ndarray | None = None
) -> np.ndarray:
    """White noise as long as `audio`, so far below the root mean square of the reference."""
    level = np.sqrt(np.mean(np.square(audio if reference is None else reference)))
    noise = np.random.default_rng(seed).standard_normal(audio.size)
    return (noise * level * 10 ** (-below_db / 20)).astype(np.float32)
