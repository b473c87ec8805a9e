"""1-D convolution and its transpose, as matrix products on the CPU.

MLX's CPU backend runs transposed and dilated convolutions, and the gradients of strided ones, as
scalar loops. Written as slices and one matrix product they run at the speed of the BLAS, forward
and backward. On a GPU MLX's own kernels are used. Sums may be ordered differently in the two
forms, so results agree to rounding, not to the bit.
"""

from __future__ import annotations

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
    """`conv1d` as one matrix product over the unfolded input; depthwise as a sum of products."""
    _check_conv(x, weight, dilation, groups)
    num_out, kernel, _ = weight.shape
    num_steps = (x.shape[1] - (kernel - 1) * dilation - 1) // stride + 1
    span = (num_steps - 1) * stride + 1
    starts = [tap * dilation for tap in range(kernel)]
    windows = [x[:, start : start + span : stride] for start in starts]
    if groups > 1:
        return _add([window * weight[:, tap, 0] for tap, window in enumerate(windows)])
    unfolded = windows[0] if kernel == 1 else mx.concatenate(windows, axis=-1)
    return unfolded @ weight.reshape(num_out, -1).T


def conv_transpose1d_matmul(
    x: mx.array, weight: mx.array, stride: int = 1, groups: int = 1
) -> mx.array:
    """`conv_transpose1d` as one matrix product and an overlap-add of whole strides."""
    _check_channels(x, weight, groups)
    num_out, kernel, _ = weight.shape
    batch, num_steps, _ = x.shape
    num_blocks = -(-kernel // stride)
    taps = mx.pad(weight, [(0, 0), (0, num_blocks * stride - kernel), (0, 0)])
    if groups > 1:
        spread = x[:, :, None] * taps[:, :, 0].T
    else:
        spread = x @ taps.transpose(2, 1, 0).reshape(x.shape[2], -1)
    # Each input step adds to `num_blocks` consecutive blocks of `stride` output steps.
    blocks = spread.reshape(batch, num_steps, num_blocks, stride * num_out)
    last = num_blocks - 1
    shifted = [mx.pad(blocks[:, :, i], [(0, 0), (i, last - i), (0, 0)]) for i in range(num_blocks)]
    summed = _add(shifted).reshape(batch, -1, num_out)
    return summed[:, : (num_steps - 1) * stride + kernel]


def _add(terms: list[mx.array]) -> mx.array:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


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
