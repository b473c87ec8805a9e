"""Speech as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from csm_studio.generation.prompt import Segment
from csm_studio.generation.streaming import Progress, stream_generate
from csm_studio.models.csm import CSM
from csm_studio.models.mimi.codec import Mimi
from csm_studio.text.tokenizer import TextTokenizer

# Large enough that the codec runs at full speed, small enough that its memory stays small.
_CHUNK_FRAMES = 25


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """One utterance.

    Attributes:
        audio: Float32 (S,) at 24 kHz.
        num_frames: Its frames of 80 ms.
        ended_by_itself: Whether the model ended the speech, rather than the length limit.
        seed: The seed it was drawn with.
    """

    audio: np.ndarray
    num_frames: int
    ended_by_itself: bool
    seed: int


def generate(
    model: CSM,
    text: str,
    speaker: int,
    context: Sequence[Segment] = (),
    max_audio_length_ms: float = 10_000,
    *,
    temperature: float = 0.9,
    top_k: int = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    codec: Mimi | None = None,
    tokenizer: TextTokenizer | None = None,
    progress: Progress | None = None,
) -> mx.array:
    """Generate speech. The arguments are those of `stream_generate`.

    Returns:
        Float32 (S,) at 24 kHz.

    Raises:
        CsmStudioError: As `stream_generate`.
        GenerationError: The model ended the speech before it began.
    """
    speech = generate_speech(
        model,
        text,
        speaker,
        context,
        max_audio_length_ms,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        codec=codec,
        tokenizer=tokenizer,
        progress=progress,
    )
    return mx.array(speech.audio)


def generate_speech(
    model: CSM,
    text: str,
    speaker: int,
    context: Sequence[Segment] = (),
    max_audio_length_ms: float = 10_000,
    **settings: Any,
) -> Generation:
    """Generate speech as `generate` does, and tell how it went."""
    stream = stream_generate(
        model, text, speaker, context, max_audio_length_ms, chunk_frames=_CHUNK_FRAMES, **settings
    )
    audio = np.concatenate(list(stream))
    return Generation(audio, stream.num_frames, stream.ended_by_itself, stream.seed)
