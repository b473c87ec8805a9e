"""Speech as it is generated: chunks of samples from a streaming codec."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterator, Sequence

import mlx.core as mx
import numpy as np

from csm_studio.constants import FRAME_MS
from csm_studio.errors import GenerationError, OptionError
from csm_studio.generation.frames import FrameLoop
from csm_studio.generation.prompt import Prompt, Segment, build_prompt
from csm_studio.generation.settings import SamplingOptions
from csm_studio.model_folder import check_companions, default_companions
from csm_studio.models.csm import CSM, Companions
from csm_studio.models.mimi.codec import Mimi
from csm_studio.options import check
from csm_studio.text.tokenizer import TextTokenizer

Progress = Callable[[int, int], None]
"""Called with frames done and the most there can be, after each frame."""

STREAM_CHUNK_FRAMES = 4
_SEED_BELOW = 2**32


class SpeechStream(Iterator[np.ndarray]):
    """Chunks of one utterance, float32 (S,) at 24 kHz, each generated when it is asked for.

    All of it runs on the thread that iterates.

    Args:
        model: The model.
        prompt: What to say, and what was said before.
        codec: Decodes the frames.
        max_frames: Length limit, at least 1.
        options: How codes are drawn.
        seed: Decides every draw.
        chunk_frames: Frames decoded together; the last chunk may have fewer.
        progress: Called after each frame.

    Attributes:
        seed: The seed used.
        max_frames: The length limit.
        num_frames: Frames generated so far.
        ended_by_itself: Whether the model ended the speech, rather than the limit; known at the
            end.
    """

    def __init__(
        self,
        model: CSM,
        prompt: Prompt,
        codec: Mimi,
        max_frames: int,
        options: SamplingOptions,
        seed: int,
        chunk_frames: int = STREAM_CHUNK_FRAMES,
        progress: Progress | None = None,
    ) -> None:
        self.seed = seed
        self.max_frames = max_frames
        self.num_frames = 0
        self.ended_by_itself = False
        self._loop = FrameLoop(model, prompt, options, seed, codec.config.codebook_size)
        self._codec = codec
        self._decoder_state = codec.decoder_state()
        self._chunk_frames = chunk_frames
        self._progress = progress
        self._chunks = self._generate()

    def __next__(self) -> np.ndarray:
        """Return the next chunk.

        Raises:
            GenerationError: The model ended the speech before it began.
        """
        return next(self._chunks)

    def close(self) -> None:
        """Stop generating."""
        self._chunks.close()

    def _generate(self) -> Generator[np.ndarray, None, None]:
        pending: list[np.ndarray] = []
        self._loop.enqueue()
        while True:
            codes = self._loop.wait()
            self.ended_by_itself = not codes.any()
            if not self.ended_by_itself:
                pending.append(codes)
                self.num_frames += 1
            is_last = self.ended_by_itself or self.num_frames == self.max_frames
            is_chunk = bool(pending) and (is_last or len(pending) == self._chunk_frames)
            # Queued in this order, the chunk is heard while the next frame is computed.
            audio = self._decode(pending) if is_chunk else None
            if not is_last:
                self._loop.enqueue()
            if self._progress is not None and not self.ended_by_itself:
                self._progress(self.num_frames, self.max_frames)
            if audio is not None:
                pending = []
                yield np.array(audio)[0]
            if is_last:
                break
        if self.num_frames == 0:
            raise GenerationError(
                f"The model ended the speech before it began (seed {self.seed}). Try another seed, "
                "a temperature nearer 0.9, a longer text, or less context."
            )

    def _decode(self, frames: Sequence[np.ndarray]) -> mx.array:
        codes = mx.array(np.stack(frames, axis=1))[None]
        audio = self._codec.decode(codes, self._decoder_state)
        mx.async_eval(audio, self._decoder_state.arrays())
        return audio


def stream_generate(
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
    chunk_frames: int = STREAM_CHUNK_FRAMES,
) -> SpeechStream:
    """Generate speech chunk by chunk.

    Args:
        model: The model, from `load_model`, or with weights loaded.
        text: What to say.
        speaker: Who says it, from 0; with a finetuned voice, the speaker of its training.
        context: Earlier turns, oldest first.
        max_audio_length_ms: Length limit, counted in whole frames of 80 ms.
        temperature: As the other settings of sampling, see `SamplingOptions`.
        top_k: Likeliest codes to draw from; 0 means all.
        top_p: Probability mass to draw from.
        min_p: Least probability of a code, relative to the likeliest.
        seed: Same seed, same speech. None draws one, kept in the stream's `seed`.
        codec: In place of the model's own.
        tokenizer: In place of the model's own.
        progress: Called after each frame with frames done and the most there can be.
        chunk_frames: Frames of 80 ms per chunk: fewer are heard sooner and cost more work.

    Returns:
        The stream. Its chunks, joined, are what `generate` returns, to float rounding.

    Raises:
        OptionError: A setting is out of bounds.
        GenerationError: Prompt and speech do not fit the model's context.
        ConfigError: Model, codec and tokenizer do not belong together.
        TokenizerError: The text is empty.
        AudioError: A context file cannot be read.
        HubError: The companions must be downloaded and cannot be.
    """
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    check(options)
    if chunk_frames < 1:
        raise OptionError(f"chunk_frames is {chunk_frames}; it must be at least 1.")
    max_frames = _max_frames(max_audio_length_ms)
    seed = _checked_seed(seed)
    companions = _companions(model, codec, tokenizer)
    num_codebooks = model.config.audio_num_codebooks
    prompt = build_prompt(text, speaker, context, companions, num_codebooks)
    _check_fits(model, prompt.num_frames, max_frames)
    return SpeechStream(
        model, prompt, companions.codec, max_frames, options, seed, chunk_frames, progress
    )


def _max_frames(max_audio_length_ms: float) -> int:
    if not FRAME_MS <= max_audio_length_ms < float("inf"):
        raise OptionError(
            f"--max-audio-length-ms is {max_audio_length_ms:g}; it must be at least {FRAME_MS}, "
            "one frame."
        )
    return int(max_audio_length_ms // FRAME_MS)


def _checked_seed(seed: int | None) -> int:
    if seed is None:
        return secrets.randbelow(_SEED_BELOW)
    if not 0 <= seed < _SEED_BELOW:
        raise OptionError(f"--seed is {seed}; it must be from 0 to {_SEED_BELOW - 1}.")
    return seed


def _companions(model: CSM, codec: Mimi | None, tokenizer: TextTokenizer | None) -> Companions:
    if codec is None or tokenizer is None:
        own = model.companions or default_companions(model.config)
        codec, tokenizer = codec or own.codec, tokenizer or own.tokenizer
    companions = Companions(codec, tokenizer)
    check_companions(model.config, companions)
    return companions


def _check_fits(model: CSM, prompt_frames: int, max_frames: int) -> None:
    limit = model.config.backbone.max_position_embeddings
    if prompt_frames + max_frames >= limit:
        room_ms = max(limit - 1 - prompt_frames, 0) * FRAME_MS
        raise GenerationError(
            f"The prompt takes {prompt_frames} positions (text and context) and the speech up to "
            f"{max_frames} ({max_frames * FRAME_MS} ms); together they must stay below {limit}. "
            f"Shorten the text or the context, or ask for at most {room_ms} ms."
        )
