"""SEANet, the convolutional encoder and decoder of Mimi.

Layer numbers are those of the public checkpoints; ELU activations take a number too.
Source: Défossez et al. 2022 (EnCodec) and 2024 (Moshi); kyutai-labs/moshi `modules/seanet.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from csm_studio.configs import MimiConfig
from csm_studio.models.mimi.conv import ELU, CausalConv1d, CausalConvTranspose1d, ConvState

SEANetState = list["ConvState | SEANetState | None"]


class ResidualBlock(nn.Module):
    """ELU, dilated convolution, ELU, pointwise convolution, and the input added."""

    def __init__(self, config: MimiConfig, channels: int, dilation: int) -> None:
        super().__init__()
        hidden = channels // config.compress
        self.block = [
            ELU(),
            CausalConv1d(channels, hidden, config.residual_kernel_size, dilation=dilation),
            ELU(),
            CausalConv1d(hidden, channels, 1),
        ]

    def __call__(self, x: mx.array, state: SEANetState | None = None) -> mx.array:
        """Map (B, T, C) to (B, T, C)."""
        return x + run_layers(self.block, x, state)


class SEANetEncoder(nn.Module):
    """Waveform to latents: strides are the upsampling ratios in reverse."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        channels = config.num_filters
        layers: list[nn.Module] = [CausalConv1d(1, channels, config.kernel_size)]
        for ratio in reversed(config.upsampling_ratios):
            layers += _residual_blocks(config, channels)
            layers += [ELU(), CausalConv1d(channels, 2 * channels, 2 * ratio, stride=ratio)]
            channels *= 2
        layers += [ELU(), CausalConv1d(channels, config.hidden_size, config.last_kernel_size)]
        self.layers = layers

    def __call__(self, x: mx.array, state: SEANetState | None = None) -> mx.array:
        """Map a waveform (B, S, 1) to latents (B, ceil(S / hop), D)."""
        return run_layers(self.layers, x, state)


class SEANetDecoder(nn.Module):
    """Latents to waveform: the encoder mirrored."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        channels = config.num_filters * 2 ** len(config.upsampling_ratios)
        layers: list[nn.Module] = [CausalConv1d(config.hidden_size, channels, config.kernel_size)]
        for ratio in config.upsampling_ratios:
            upsample = CausalConvTranspose1d(channels, channels // 2, 2 * ratio, ratio)
            channels //= 2
            layers += [ELU(), upsample, *_residual_blocks(config, channels)]
        layers += [ELU(), CausalConv1d(channels, 1, config.last_kernel_size)]
        self.layers = layers

    def __call__(self, x: mx.array, state: SEANetState | None = None) -> mx.array:
        """Map latents (B, T, D) to a waveform (B, T * hop, 1)."""
        return run_layers(self.layers, x, state)


def make_state(layers: Sequence[nn.Module]) -> SEANetState:
    """Return an empty streaming state for each layer (None for a layer without a past)."""
    state: SEANetState = []
    for layer in layers:
        if isinstance(layer, (CausalConv1d, CausalConvTranspose1d)):
            state.append(ConvState())
        elif isinstance(layer, ResidualBlock):
            state.append(make_state(layer.block))
        else:
            state.append(None)
    return state


def run_layers(layers: Sequence[nn.Module], x: mx.array, state: SEANetState | None) -> mx.array:
    """Run layers in order, each with its own part of the state."""
    for index, layer in enumerate(layers):
        part = state[index] if state is not None else None
        x = layer(x, part) if part is not None else layer(x)
    return x


def _residual_blocks(config: MimiConfig, channels: int) -> list[nn.Module]:
    return [
        ResidualBlock(config, channels, config.dilation_growth_rate**index)
        for index in range(config.num_residual_layers)
    ]
