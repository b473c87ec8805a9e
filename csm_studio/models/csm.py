"""The Sesame conversational speech model in MLX.

A position is a *frame* of K + 1 tokens: K Mimi codes and one text token. The embeddings of a
frame's unmasked tokens are summed. The backbone predicts codebook 0 of the next frame; the depth
decoder predicts the other codebooks one after the other, given the backbone's hidden state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from csm_studio.checkpoints.formats import read_csm
from csm_studio.checkpoints.weights import for_device, shapes_of
from csm_studio.configs import CSMConfig
from csm_studio.models.llama import KVCache, LlamaModel

if TYPE_CHECKING:
    from csm_studio.models.lora import AdapterSpec
    from csm_studio.models.mimi.codec import Mimi
    from csm_studio.text.tokenizer import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Companions:
    """What a CSM needs beside its weights to read text and to be heard."""

    codec: Mimi
    tokenizer: TextTokenizer


class CSM(nn.Module):
    """Backbone, depth decoder and the embeddings and heads around them.

    Args:
        config: The geometry, such as `csm_1b()`.

    Attributes:
        companions: Codec and tokenizer, set by `load_model`; not part of the parameters.
        adapter: Description of the LoRA adapter applied (`lora.AdapterSpec`), or None.
    """

    def __init__(self, config: CSMConfig) -> None:
        super().__init__()
        self.config = config
        self.companions: Companions | None = None
        self.adapter: AdapterSpec | None = None
        num_codebooks, vocab = config.audio_num_codebooks, config.audio_vocab_size
        width, depth_width = config.backbone.hidden_size, config.decoder.hidden_size
        self.backbone = LlamaModel(config.backbone)
        self.decoder = LlamaModel(config.decoder)
        self.text_embeddings = nn.Embedding(config.text_vocab_size, width)
        # One table for all codebooks: row = codebook * vocab + code.
        self.audio_embeddings = nn.Embedding(num_codebooks * vocab, width)
        self.projection = nn.Linear(width, depth_width, bias=False)
        self.codebook0_head = nn.Linear(width, vocab, bias=False)
        self.audio_head = mx.random.normal(
            (num_codebooks - 1, depth_width, vocab), scale=depth_width**-0.5
        )

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of activations: that of the backbone's weights, whatever the embeddings' is."""
        return self.backbone.norm.weight.dtype

    def embed_frames(self, tokens: mx.array, mask: mx.array) -> mx.array:
        """Sum the embeddings of each frame's unmasked tokens.

        Args:
            tokens: Integer (B, T, K + 1): K audio codes, then the text token.
            mask: Boolean or 0/1 (B, T, K + 1): which tokens count.

        Returns:
            (B, T, D) in the model's dtype.
        """
        num_codebooks = self.config.audio_num_codebooks
        text = self.text_embeddings(tokens[..., num_codebooks]).astype(self.dtype)
        audio = self.embed_codes(tokens[..., :num_codebooks])
        # A float32 mask would promote bf16.
        mask = mask.astype(self.dtype)
        # (B, T, 1, K) @ (B, T, K, D): the masked sum without a masked copy of the embeddings.
        audio_sum = (mask[..., None, :num_codebooks] @ audio).squeeze(-2)
        return audio_sum + text * mask[..., num_codebooks:]

    def embed_codes(self, codes: mx.array, first_codebook: int = 0) -> mx.array:
        """Look up audio codes (..., k), of codebooks `first_codebook` onwards, as (..., k, D)."""
        offsets = mx.arange(first_codebook, first_codebook + codes.shape[-1])
        rows = codes + offsets * self.config.audio_vocab_size
        return self.audio_embeddings(rows).astype(self.dtype)

    def hidden_states(
        self, tokens: mx.array, mask: mx.array, caches: list[KVCache] | None = None
    ) -> mx.array:
        """Run the backbone.

        Args:
            tokens: Integer (B, T, K + 1).
            mask: Boolean or 0/1 (B, T, K + 1).
            caches: The backbone's caches, extended by T positions, or None for a whole sequence.

        Returns:
            (B, T, D) after the final norm; position t predicts frame t + 1.
        """
        return self.backbone(self.embed_frames(tokens, mask), caches)

    def codebook0_logits(self, hidden: mx.array) -> mx.array:
        """Map hidden states (..., D) to logits (..., V) of the next frame's codebook 0."""
        return self.codebook0_head(hidden)

    def depth_logits(self, hidden: mx.array, codes: mx.array) -> mx.array:
        """Predict codebooks 1 to K - 1 of known frames (teacher forcing).

        Args:
            hidden: (N, D), the backbone's state at the position before each frame.
            codes: Integer (N, K), the frames' true codes.

        Returns:
            (N, K - 1, V): logits of codebook i + 1 given the codes up to i.
        """
        known = self.embed_codes(codes[:, :-1])
        inputs = mx.concatenate([hidden[:, None], known], axis=1)
        outputs = self.decoder(self.projection(inputs))[:, 1:]
        if isinstance(self.audio_head, mx.array):
            # (K-1, N, d) @ (K-1, d, V): each codebook has its own head.
            return (outputs.swapaxes(0, 1) @ self.audio_head).swapaxes(0, 1)
        return self.audio_head(outputs)

    def depth_start(self, hidden: mx.array, code0: mx.array, caches: list[KVCache]) -> mx.array:
        """Begin a frame: feed the backbone's state and codebook 0 to fresh depth caches.

        Args:
            hidden: (B, D).
            code0: Integer (B,).
            caches: Empty caches of the depth decoder.

        Returns:
            Logits (B, V) of codebook 1.
        """
        known = self.embed_codes(code0[:, None])
        inputs = mx.concatenate([hidden[:, None], known], axis=1)
        return self._head_logits(self.decoder(self.projection(inputs), caches)[:, -1], 0)

    def depth_step(self, code: mx.array, codebook: int, caches: list[KVCache]) -> mx.array:
        """Feed codebook `codebook`'s code (B,) and return the logits (B, V) of the next one."""
        inputs = self.projection(self.embed_codes(code[:, None], codebook))
        return self._head_logits(self.decoder(inputs, caches)[:, -1], codebook)

    def load_weights(
        self, file_or_weights: str | Path | Sequence[tuple[str, mx.array]], strict: bool = True
    ) -> CSM:
        """Load weights from a file, a sharded folder or named arrays, in any known layout.

        The layout (MLX, mlx-audio, Sesame/torchtune or HF transformers) is told by the keys. On
        a CPU the weights become float32, since half precision never uses the BLAS there.

        Args:
            file_or_weights: A safetensors file, an index or a folder of shards, or (name, array)
                pairs under this model's own names.
            strict: With pairs, whether every parameter must be given.

        Raises:
            WeightsError: Lists every missing, unexpected and misshapen tensor.
        """
        if not isinstance(file_or_weights, (str, Path)):
            super().load_weights(list(file_or_weights), strict=strict)
            return self
        expected = shapes_of(self.parameters())
        weights = read_csm(Path(file_or_weights), self.config, expected)
        super().load_weights(list(for_device(weights).items()), strict=True)
        mx.eval(self.parameters())
        return self

    def _head_logits(self, outputs: mx.array, index: int) -> mx.array:
        head: Any = self.audio_head
        if isinstance(head, mx.array):
            return outputs @ head[index]
        return head.one(outputs, index)
