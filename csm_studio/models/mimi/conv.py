"""Mimi's causal convolution layers, offline and streaming.

Offline a layer pads on the left with what a stream would have had there at its start, so both
give the same result. A stream's past is in a state object that the caller owns.
"""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import mlx.nn as nn

from csm_studio.models.mimi.convolution import conv1d, conv_transpose1d


@dataclasses.dataclass
class ConvState:
    """The past of one convolution in a stream.

    Attributes:
        tail: For `CausalConv1d` the last inputs (B, k_eff - stride, C_in); for
            `CausalConvTranspose1d` the outputs (B, k - stride, C_out) that wait for later inputs.
            None before the first chunk.
    """

    tail: mx.array | None = None


class ELU(nn.Module):
    """Exponential linear unit, written so that MLX's CPU backend runs it twice as fast."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map x to x where positive, else to exp(x) - 1."""
        # exp(x) - 1 >= x everywhere, so the larger of the two needs no selection.
        return mx.maximum(x, mx.exp(mx.minimum(x, 0)) - 1)


class CausalConv1d(nn.Module):
    """Convolution whose output at t sees inputs up to t only.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: k.
        stride: Input steps per output step.
        dilation: Spacing of the kernel's taps.
        bias: Whether to add a bias.
        replicate: Pad with copies of the first and last input instead of zeros.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        replicate: bool = False,
    ) -> None:
        super().__init__()
        scale = (in_channels * kernel_size) ** -0.5
        self.weight = mx.random.uniform(-scale, scale, (out_channels, kernel_size, in_channels))
        if bias:
            self.bias = mx.zeros((out_channels,))
        self.stride = stride
        self.dilation = dilation
        self.replicate = replicate
        self.span = (kernel_size - 1) * dilation + 1

    def __call__(self, x: mx.array, state: ConvState | None = None) -> mx.array:
        """Convolve x (B, T, C_in) to (B, ceil(T / stride), C_out).

        A streamed chunk's T must be a multiple of the stride; an offline input is filled up on
        the right to whole strides.
        """
        past = self.span - self.stride
        tail = state.tail if state is not None else None
        if tail is None:
            tail = _edge(x[:, :1], past, self.replicate)
        joined = mx.concatenate([tail, x], axis=1)
        if state is not None:
            state.tail = joined[:, joined.shape[1] - past :]
        else:
            missing = -x.shape[1] % self.stride
            joined = mx.concatenate([joined, _edge(x[:, -1:], missing, self.replicate)], axis=1)
        y = conv1d(joined, self.weight, stride=self.stride, dilation=self.dilation)
        return y + self.bias if "bias" in self else y


class CausalConvTranspose1d(nn.Module):
    """Transposed convolution trimmed on the right: T inputs give exactly T * stride outputs.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: k, at least the stride.
        stride: Output steps per input step.
        depthwise: One kernel per channel (C_in equals C_out).
        bias: Whether to add a bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        depthwise: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.groups = in_channels if depthwise else 1
        fan_in = in_channels // self.groups
        scale = (fan_in * kernel_size) ** -0.5
        self.weight = mx.random.uniform(-scale, scale, (out_channels, kernel_size, fan_in))
        if bias:
            self.bias = mx.zeros((out_channels,))
        self.stride = stride
        self.overlap = kernel_size - stride

    def __call__(self, x: mx.array, state: ConvState | None = None) -> mx.array:
        """Map x (B, T, C_in) to (B, T * stride, C_out)."""
        length = x.shape[1] * self.stride
        y = conv_transpose1d(x, self.weight, stride=self.stride, groups=self.groups)
        if state is not None:
            if state.tail is not None:
                head = y[:, : self.overlap] + state.tail
                y = mx.concatenate([head, y[:, self.overlap :]], axis=1)
            state.tail = y[:, length:]
        y = y[:, :length]
        return y + self.bias if "bias" in self else y


def _edge(sample: mx.array, length: int, replicate: bool) -> mx.array:
    """Return (B, length, C) of padding: copies of `sample` (B, 1, C) or zeros."""
    padding = mx.repeat(sample, length, axis=1)
    return padding if replicate else mx.zeros_like(padding)
