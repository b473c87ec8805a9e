"""The prompt: earlier turns and the text to speak, as frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from csm_studio.audio.io import read_audio
from csm_studio.constants import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from csm_studio.errors import GenerationError, OptionError
from csm_studio.models.csm import Companions


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """An earlier turn of the conversation: who said what, and how it sounded.

    Attributes:
        speaker: The speaker's number, from 0.
        text: What was said.
        audio: Float (S,) at 24 kHz; or else
        audio_path: An audio file of any kind and rate.
    """

    speaker: int
    text: str
    audio: np.ndarray | mx.array | None = None
    audio_path: Path | str | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Frames to continue.

    Attributes:
        tokens: Int32 (1, T, K + 1): K codes, then the text token.
        mask: Boolean (1, T, K + 1): which tokens count.
    """

    tokens: mx.array
    mask: mx.array

    @property
    def num_frames(self) -> int:
        """T."""
        return self.tokens.shape[1]


def build_prompt(
    text: str,
    speaker: int,
    context: Sequence[Segment],
    companions: Companions,
    num_codebooks: int,
) -> Prompt:
    """Lay out the context's turns and the text to speak as frames.

    A turn is its text, one frame per token, and its audio, one frame per 80 ms, ended by a frame
    of K zeros. The text to speak comes last.

    Args:
        text: What to say.
        speaker: Who says it, from 0.
        context: Earlier turns, oldest first.
        companions: Codec and tokenizer.
        num_codebooks: K of the model, at most the codec's.

    Raises:
        TokenizerError: A text is empty or a speaker negative.
        GenerationError: A turn has no audio, or audio and a file at once.
        AudioError: A file cannot be read.
    """
    tokens: list[np.ndarray] = []
    masks: list[np.ndarray] = []

    def add(values: np.ndarray, columns: slice) -> None:
        frames = np.zeros((len(values), num_codebooks + 1), np.int32)
        frames[:, columns] = values
        mask = np.zeros(frames.shape, bool)
        mask[:, columns] = True
        tokens.append(frames)
        masks.append(mask)

    text_column, audio_columns = slice(num_codebooks, None), slice(num_codebooks)
    for index, segment in enumerate(context):
        ids = companions.tokenizer.encode_segment(segment.text, segment.speaker)
        add(np.array(ids)[:, None], text_column)
        codes = np.array(companions.codec.encode(mx.array(_audio(segment, index))[None]))
        add(codes[0, :num_codebooks].T, audio_columns)
        add(np.zeros((1, num_codebooks), np.int32), audio_columns)
    ids = companions.tokenizer.encode_segment(text, speaker)
    add(np.array(ids)[:, None], text_column)
    return Prompt(
        mx.array(np.concatenate(tokens))[None],
        mx.array(np.concatenate(masks))[None],
    )


def segments_from_files(
    paths: Sequence[Path], texts: Sequence[str], speakers: Sequence[int]
) -> list[Segment]:
    """Pair the context's files, transcripts and speakers, oldest first.

    Raises:
        OptionError: The lists are not equally long.
    """
    if not len(paths) == len(texts) == len(speakers):
        raise OptionError(
            f"The context has {len(paths)} --context-audio, {len(texts)} --context-text and "
            f"{len(speakers)} --context-speaker. Give one of each per turn, in the same order."
        )
    return [
        Segment(speaker, text, audio_path=path)
        for path, text, speaker in zip(paths, texts, speakers, strict=True)
    ]


def _audio(segment: Segment, index: int) -> np.ndarray:
    """Return a turn's samples, float32 (S,) at 24 kHz, with silence up to a whole frame."""
    name = f"context turn {index + 1} ({segment.text!r})"
    if (segment.audio is None) == (segment.audio_path is None):
        how = "no audio" if segment.audio is None else "both audio and audio_path"
        raise GenerationError(f"{name}: has {how}. Give one of audio and audio_path.")
    if segment.audio_path is not None:
        samples = read_audio(segment.audio_path)
    else:
        samples = np.asarray(segment.audio, dtype=np.float32)
    if samples.ndim != 1 or samples.size == 0 or not np.isfinite(samples).all():
        raise GenerationError(
            f"{name}: audio of shape {samples.shape} cannot be used. Give one row of finite "
            f"samples at {SAMPLE_RATE_HZ} Hz."
        )
    return np.pad(samples, (0, -samples.size % SAMPLES_PER_FRAME))
