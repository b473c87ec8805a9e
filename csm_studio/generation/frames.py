"""The loop over frames: each one sampled from the model given the prompt and those before."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from csm_studio.generation.prompt import Prompt
from csm_studio.generation.sampling import sample
from csm_studio.generation.settings import SamplingOptions
from csm_studio.models.csm import CSM


class FrameLoop:
    """Generates frames one after the other.

    `enqueue` starts a frame and returns at once, so that the caller can do something else before
    `wait` takes its codes.

    Args:
        model: The model.
        prompt: The frames to continue, taken in one pass when the first frame is enqueued.
        options: How codes are drawn.
        seed: Decides every draw, whatever ran before and on whichever thread.
        num_codes: Codes from this number on are never drawn: CSM's vocabulary has a few entries
            that no codec can decode. None allows all.
    """

    def __init__(
        self,
        model: CSM,
        prompt: Prompt,
        options: SamplingOptions,
        seed: int,
        num_codes: int | None = None,
    ) -> None:
        self._model = model
        self._options = options
        self._key = mx.random.key(seed)
        self._caches = model.backbone.make_caches()
        self._tokens, self._mask = prompt.tokens, prompt.mask
        vocab = model.config.audio_vocab_size
        is_code = mx.arange(vocab) < (vocab if num_codes is None else num_codes)
        self._ruled_out = mx.where(is_code, 0.0, -mx.inf)
        # Evaluated arrays may cross to the thread that will generate; lazy ones may not.
        mx.eval(self._key, self._ruled_out)

    def enqueue(self) -> None:
        """Begin computing the next frame."""
        num_codebooks = self._model.config.audio_num_codebooks
        hidden = self._model.hidden_states(self._tokens, self._mask, self._caches)[:, -1]
        codes = self._draw_frame(hidden)
        self._tokens = mx.pad(codes, [(0, 0), (0, 1)])[:, None]
        self._mask = (mx.arange(num_codebooks + 1) < num_codebooks)[None, None]
        mx.async_eval(self._tokens)

    def wait(self) -> np.ndarray:
        """Return the codes of the frame begun last, int32 (K,). All zero means the end."""
        return np.array(self._tokens)[0, 0, :-1]

    def _draw_frame(self, hidden: mx.array) -> mx.array:
        """Draw the K codes of the frame after hidden (1, D), as int32 (1, K), in one graph."""
        model, num_codebooks = self._model, self._model.config.audio_num_codebooks
        self._key, frame_key = mx.random.split(self._key)
        keys = mx.random.split(frame_key, num_codebooks)
        codes = [self._draw(model.codebook0_logits(hidden), keys[0])]
        # A frame is K depth positions: no cache grows, none is longer than needed.
        caches = model.decoder.make_caches(block=num_codebooks)
        for codebook in range(1, num_codebooks):
            if codebook == 1:
                logits = model.depth_start(hidden, codes[0], caches)
            else:
                logits = model.depth_step(codes[-1], codebook - 1, caches)
            codes.append(self._draw(logits, keys[codebook]))
        return mx.stack(codes, axis=1)

    def _draw(self, logits: mx.array, key: mx.array) -> mx.array:
        code = sample(logits.astype(mx.float32) + self._ruled_out, self._options, key)
        return code.astype(mx.int32)
