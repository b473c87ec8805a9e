"""Mimi: 24 kHz speech to and from 12.5 frames of K codes a second.

Causal throughout: a prefix of the audio gives a prefix of the codes, and streaming in chunks of
whole frames gives exactly what the whole gives. The codec holds no state; a stream's past is a
`MimiState` that the caller makes and passes in.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from csm_studio.checkpoints.formats import read_mimi
from csm_studio.checkpoints.weights import shapes_of
from csm_studio.configs import MimiConfig
from csm_studio.constants import SAMPLES_PER_FRAME
from csm_studio.models.mimi import seanet
from csm_studio.models.mimi.conv import CausalConv1d, CausalConvTranspose1d, ConvState
from csm_studio.models.mimi.quantizer import SplitQuantizer
from csm_studio.models.mimi.transformer import MimiTransformer, WindowState


@dataclasses.dataclass
class MimiState:
    """The past of one stream in one direction (encoding or decoding)."""

    convolutions: seanet.SEANetState
    attention: list[WindowState]
    resampling: ConvState

    def arrays(self) -> list[mx.array]:
        """Return every array of the state, for `mx.eval`."""
        found: list[mx.array] = []

        def visit(part: object) -> None:
            if isinstance(part, list):
                for item in part:
                    visit(item)
            elif isinstance(part, ConvState) and part.tail is not None:
                found.append(part.tail)
            elif isinstance(part, WindowState) and part.keys is not None:
                found.extend(array for array in (part.keys, part.values) if array is not None)

        visit([self.convolutions, self.attention, self.resampling])
        return found


class Mimi(nn.Module):
    """The codec.

    Args:
        config: The geometry; `MimiConfig()` is the public one.
    """

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.encoder = seanet.SEANetEncoder(config)
        self.encoder_transformer = MimiTransformer(config)
        self.downsample = CausalConv1d(width, width, 4, stride=2, bias=False, replicate=True)
        self.quantizer = SplitQuantizer(config)
        self.upsample = CausalConvTranspose1d(width, width, 4, 2, depthwise=True, bias=False)
        self.decoder_transformer = MimiTransformer(config)
        self.decoder = seanet.SEANetDecoder(config)

    def encode(self, audio: mx.array, state: MimiState | None = None) -> mx.array:
        """Encode speech.

        Args:
            audio: Float (B, S) at 24 kHz. With a state, S must be a multiple of 1920.
            state: From `encoder_state`, to go on with a stream.

        Returns:
            Int32 codes (B, K, ceil(S / 1920)).

        Raises:
            ValueError: A streamed chunk is not of whole frames.
        """
        return self.quantizer.encode(self.encode_latents(audio, state))

    def encode_latents(self, audio: mx.array, state: MimiState | None = None) -> mx.array:
        """Encode (B, S) speech to latents (B, T, D) as they are before the quantizer."""
        if state is not None and audio.shape[1] % SAMPLES_PER_FRAME:
            raise ValueError(
                f"a streamed chunk has {audio.shape[1]} samples; it must be a multiple of "
                f"{SAMPLES_PER_FRAME}"
            )
        x = self.encoder(audio[..., None], state.convolutions if state else None)
        x = self.encoder_transformer(x, state.attention if state else None)
        return self.downsample(x, state.resampling if state else None)

    def decode(self, codes: mx.array, state: MimiState | None = None) -> mx.array:
        """Decode codes.

        Args:
            codes: Integer (B, K, T).
            state: From `decoder_state`, to go on with a stream.

        Returns:
            Float (B, 1920 * T) at 24 kHz.
        """
        x = self.upsample(self.quantizer.decode(codes), state.resampling if state else None)
        x = self.decoder_transformer(x, state.attention if state else None)
        return self.decoder(x, state.convolutions if state else None)[..., 0]

    def encoder_state(self) -> MimiState:
        """Return the state at the start of a stream to encode."""
        return MimiState(
            seanet.make_state(self.encoder.layers),
            self.encoder_transformer.make_states(),
            ConvState(),
        )

    def decoder_state(self) -> MimiState:
        """Return the state at the start of a stream to decode."""
        return MimiState(
            seanet.make_state(self.decoder.layers),
            self.decoder_transformer.make_states(),
            ConvState(),
        )

    def load_file(self, path: Path) -> Mimi:
        """Load weights in this project's, kyutai's or HF transformers' layout, as float32.

        Raises:
            WeightsError: Lists every missing, unexpected and misshapen tensor.
        """
        expected = shapes_of(self.parameters())
        weights = read_mimi(path, self.config, expected)
        # Codes are decided by small distances: float32 everywhere.
        self.load_weights([(name, value.astype(mx.float32)) for name, value in weights.items()])
        mx.eval(self.parameters())
        return self
