"""1-D convolution and its transpose, as matrix products on the CPU.

MLX's CPU backend runs transposed and dilated convolutions, and the gradients of strided ones, as
scalar loops. Written as slices and one matrix product they run at the speed of the BLAS, forward
and backward. On a GPU MLX's own kernels are used. Sums may be ordered differently in the two
forms, so results agree to rounding, not to the bit.
"""

from __future__ import annotations

import functools
import operator

import mlx.core as mx


def conv1d(
    x: mx.array, weight: mx.array, stride: int = 1, dilation: int = 1, groups: int = 1
) -> mx.array:
    """Convolve without padding, in the form that is quick on the default device.

    Args:
        x: (B, T, C_in) float.
        weight: (C_out, k, C_in / groups) float.
        stride: Steps of input between two outputs.
        dilation: Steps of input between two taps of the kernel.
        groups: 1, or C_in for a depthwise convolution.

    Returns:
        (B, T_out, C_out), T_out = (T - (k - 1) * dilation - 1) // stride + 1.

    Raises:
        ValueError: The shapes do not fit, the input is shorter than the kernel, or `groups` is
            neither 1 nor C_in.
    """
    if mx.default_device() == mx.cpu:
        return conv1d_matmul(x, weight, stride, dilation, groups)
    _check_conv(x, weight, dilation, groups)
    return mx.conv1d(x, weight, stride=stride, dilation=dilation, groups=groups)


def conv_transpose1d(x: mx.array, weight: mx.array, stride: int = 1, groups: int = 1) -> mx.array:
    """Transposed convolution of full length, in the form that is quick on the default device.

    Args:
        x: (B, T, C_in) float.
        weight: (C_out, k, C_in / groups) float.
        stride: Steps of output between two inputs.
        groups: 1, or C_in for a depthwise convolution.

    Returns:
        (B, (T - 1) * stride + k, C_out): nothing trimmed.

    Raises:
        ValueError: The shapes do not fit, or `groups` is neither 1 nor C_in.
    """
    if mx.default_device() == mx.cpu:
        return conv_transpose1d_matmul(x, weight, stride, groups)
    _check_channels(x, weight, groups)
    return mx.conv_transpose1d(x, weight, stride=stride, groups=groups)


def conv1d_matmul(
    x: mx.array, weight: mx.array, stride: int = 1, dilation: int = 1, groups: int = 1
) -> mx.array:
    """`conv1d` as one matrix product (depthwise: as a sum of products by tap)."""
    _check_conv(x, weight, dilation, groups)
    if groups > 1:
        return _depthwise(x, weight, stride, dilation)
    if dilation > 1 and stride > 1:
        return conv1d_matmul(x, weight, 1, dilation)[:, ::stride]
    num_out, kernel, num_in = weight.shape
    batch, length, _ = x.shape
    num_steps = (length - (kernel - 1) * dilation - 1) // stride + 1

    # A kernel over single steps becomes one over blocks of `stride` steps, which moves by one.
    num_taps = -(-kernel // stride)
    width = stride * num_in
    taps = _pad_taps(weight, num_taps * stride).reshape(num_out, num_taps, width)
    num_blocks = num_steps + (num_taps - 1) * dilation
    blocks = _resize(x, num_blocks * stride).reshape(batch, num_blocks, width)
    windows = [slice(tap * dilation, tap * dilation + num_steps) for tap in range(num_taps)]

    # Either the input is copied once per tap or the output is, which also costs a permutation
    # of the weight: take the form that moves fewer elements.
    if batch * num_steps * (width - num_out) > num_out * width:
        rows = taps.swapaxes(0, 1).reshape(-1, width)
        by_tap = mx.split(blocks @ rows.T, num_taps, axis=-1)
        return _add([part[:, window] for part, window in zip(by_tap, windows, strict=True)])
    if num_taps == 1:
        return blocks @ taps[:, 0].T
    unfolded = mx.concatenate([blocks[:, window] for window in windows], axis=-1)
    return unfolded @ taps.reshape(num_out, -1).T


def conv_transpose1d_matmul(
    x: mx.array, weight: mx.array, stride: int = 1, groups: int = 1
) -> mx.array:
    """`conv_transpose1d` as one matrix product and an overlap-add of whole strides."""
    _check_channels(x, weight, groups)
    num_out, kernel, num_in = weight.shape
    batch, num_steps, _ = x.shape
    num_blocks = -(-kernel // stride)
    taps = _pad_taps(weight, num_blocks * stride)
    if groups > 1:
        spread = x[:, :, None] * taps[:, :, 0].T
    elif batch * num_steps > num_in:
        spread = x @ taps.swapaxes(0, 1).reshape(-1, num_in).T
    else:  # few steps: permuting the product is cheaper than permuting the weight
        product = x @ taps.reshape(-1, num_in).T
        spread = product.reshape(batch, num_steps, num_out, -1).swapaxes(2, 3)

    # Each input step adds to `num_blocks` consecutive blocks of `stride` output steps.
    parts = mx.split(spread.reshape(batch, num_steps, -1), num_blocks, axis=-1)
    last = num_blocks - 1
    shifted = [mx.pad(part, [(0, 0), (i, last - i), (0, 0)]) for i, part in enumerate(parts)]
    summed = _add(shifted).reshape(batch, -1, num_out)
    return summed[:, : (num_steps - 1) * stride + kernel]


def _depthwise(x: mx.array, weight: mx.array, stride: int, dilation: int) -> mx.array:
    kernel = weight.shape[1]
    span = x.shape[1] - (kernel - 1) * dilation
    starts = [tap * dilation for tap in range(kernel)]
    windows = [x[:, start : start + span : stride] for start in starts]
    return _add([window * weight[:, tap, 0] for tap, window in enumerate(windows)])


def _pad_taps(weight: mx.array, num_taps: int) -> mx.array:
    missing = num_taps - weight.shape[1]
    return mx.pad(weight, [(0, 0), (0, missing), (0, 0)]) if missing else weight


def _resize(x: mx.array, length: int) -> mx.array:
    """Cut or zero-pad x on the right; the added steps meet only zero taps."""
    missing = length - x.shape[1]
    return mx.pad(x, [(0, 0), (0, missing), (0, 0)]) if missing > 0 else x[:, :length]


def _add(terms: list[mx.array]) -> mx.array:
    return functools.reduce(operator.add, terms)


def _check_conv(x: mx.array, weight: mx.array, dilation: int, groups: int) -> None:
    _check_channels(x, weight, groups)
    reach = (weight.shape[1] - 1) * dilation + 1
    if x.shape[1] < reach:
        raise ValueError(f"Input of {x.shape[1]} steps is shorter than the kernel's {reach}.")


def _check_channels(x: mx.array, weight: mx.array, groups: int) -> None:
    num_in = x.shape[-1]
    if groups not in (1, num_in):
        raise ValueError(f"groups is {groups}; only 1 or the {num_in} input channels will do.")
    if weight.shape[2] * groups != num_in or (groups > 1 and weight.shape[0] != groups):
        raise ValueError(
            f"Weight {weight.shape} does not fit {num_in} input channels in {groups} groups."
        )
