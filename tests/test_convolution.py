from __future__ import annotations

import itertools
from collections.abc import Callable

import mlx.core as mx
import pytest

from csm_studio.models.mimi.convolution import (
    conv1d,
    conv1d_matmul,
    conv_transpose1d,
    conv_transpose1d_matmul,
)

Convolve = Callable[..., mx.array]

TOLERANCE = 1e-5
MIMI_STRIDES = (4, 5, 6, 8)


def _random(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape) * 7 + len(shape)))


def _assert_close(actual: mx.array, expected: mx.array) -> None:
    assert actual.shape == expected.shape
    error = mx.abs(actual - expected).max() / mx.maximum(mx.abs(expected).max(), 1e-30)
    assert float(error) <= TOLERANCE


def _assert_same(form: Convolve, reference: Convolve, x: mx.array, weight: mx.array) -> None:
    """Compare outputs and both gradients, under a cotangent that differs at every position."""
    expected = reference(x, weight)
    _assert_close(form(x, weight), expected)
    cotangent = _random(*expected.shape)
    _, gradients = mx.vjp(form, [x, weight], [cotangent])
    _, expected_gradients = mx.vjp(reference, [x, weight], [cotangent])
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        _assert_close(actual, wanted)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), list(itertools.product((1, 2, 3, 7), (1, 2, 3), (1, 2)))
)
@pytest.mark.parametrize("batch", [1, 3])
def test_conv1d_forms_agree(kernel: int, stride: int, dilation: int, batch: int) -> None:
    x, weight = _random(batch, 29, 5), _random(4, kernel, 5)
    _assert_same(
        lambda x, w: conv1d_matmul(x, w, stride, dilation),
        lambda x, w: mx.conv1d(x, w, stride=stride, dilation=dilation),
        x,
        weight,
    )


@pytest.mark.parametrize("num_steps", [7, 8, 9])
@pytest.mark.parametrize("stride", [1, 4, 9])
def test_conv1d_of_inputs_as_short_as_the_kernel(num_steps: int, stride: int) -> None:
    _assert_same(
        lambda x, w: conv1d_matmul(x, w, stride),
        lambda x, w: mx.conv1d(x, w, stride=stride),
        _random(2, num_steps, 3),
        _random(6, 7, 3),
    )


@pytest.mark.parametrize(
    ("kernel", "stride"), [(1, 1), (3, 1), (4, 2), (5, 2), (7, 3), (2, 3), (3, 5), (1, 4), (9, 3)]
)
@pytest.mark.parametrize(("batch", "num_steps"), [(1, 1), (1, 6), (3, 5)])
def test_conv_transpose1d_forms_agree(kernel: int, stride: int, batch: int, num_steps: int) -> None:
    _assert_same(
        lambda x, w: conv_transpose1d_matmul(x, w, stride),
        lambda x, w: mx.conv_transpose1d(x, w, stride=stride),
        _random(batch, num_steps, 5),
        _random(4, kernel, 5),
    )


@pytest.mark.parametrize(
    ("num_steps", "num_in", "num_out"),
    [(12, 1, 8), (12, 8, 8), (60, 8, 1), (60, 8, 4), (2, 8, 4), (9, 16, 4)],
)
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (4, 2), (5, 2)])
def test_forms_agree_whichever_side_is_wider(
    num_steps: int, num_in: int, num_out: int, kernel: int, stride: int
) -> None:
    weight = _random(num_out, kernel, num_in)
    _assert_same(
        lambda x, w: conv1d_matmul(x, w, stride),
        lambda x, w: mx.conv1d(x, w, stride=stride),
        _random(2, num_steps * stride + kernel, num_in),
        weight,
    )
    _assert_same(
        lambda x, w: conv_transpose1d_matmul(x, w, stride),
        lambda x, w: mx.conv_transpose1d(x, w, stride=stride),
        _random(2, num_steps, num_in),
        weight,
    )


@pytest.mark.parametrize("stride", MIMI_STRIDES)
def test_mimi_strides(stride: int) -> None:
    _assert_same(
        lambda x, w: conv1d_matmul(x, w, stride),
        lambda x, w: mx.conv1d(x, w, stride=stride),
        _random(2, stride * 7, 16),
        _random(32, 2 * stride, 16),
    )
    _assert_same(
        lambda x, w: conv_transpose1d_matmul(x, w, stride),
        lambda x, w: mx.conv_transpose1d(x, w, stride=stride),
        _random(2, 7, 32),
        _random(16, 2 * stride, 32),
    )


@pytest.mark.parametrize(
    ("num_in", "num_out", "kernel"), [(1, 8, 7), (8, 1, 7), (16, 8, 3), (8, 16, 1)]
)
def test_mimi_kernels(num_in: int, num_out: int, kernel: int) -> None:
    _assert_same(conv1d_matmul, mx.conv1d, _random(2, 40, num_in), _random(num_out, kernel, num_in))


@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (4, 1), (3, 2), (1, 2), (2, 5)])
def test_depthwise_forms_agree(kernel: int, stride: int) -> None:
    x, weight = _random(2, 11, 6), _random(6, kernel, 1)
    _assert_same(
        lambda x, w: conv1d_matmul(x, w, stride, groups=6),
        lambda x, w: mx.conv1d(x, w, stride=stride, groups=6),
        x,
        weight,
    )
    _assert_same(
        lambda x, w: conv_transpose1d_matmul(x, w, stride, groups=6),
        lambda x, w: mx.conv_transpose1d(x, w, stride=stride, groups=6),
        x,
        weight,
    )


def test_the_public_functions_follow_the_default_device() -> None:
    x, weight = _random(2, 16, 4), _random(8, 4, 4)
    _assert_close(conv1d(x, weight, stride=2), mx.conv1d(x, weight, stride=2))
    _assert_close(conv_transpose1d(x, weight, stride=2), mx.conv_transpose1d(x, weight, stride=2))
    if mx.default_device() == mx.cpu:
        assert mx.array_equal(conv1d(x, weight, 2), conv1d_matmul(x, weight, 2))


@pytest.mark.parametrize("convolve", [conv1d, conv_transpose1d])
def test_other_groups_are_refused(convolve: Convolve) -> None:
    with pytest.raises(ValueError, match="groups is 2"):
        convolve(_random(1, 9, 4), _random(4, 3, 2), groups=2)


@pytest.mark.parametrize("convolve", [conv1d, conv_transpose1d])
def test_channels_that_do_not_fit_are_refused(convolve: Convolve) -> None:
    with pytest.raises(ValueError, match="does not fit 4 input channels"):
        convolve(_random(1, 9, 4), _random(4, 3, 5))


def test_an_input_shorter_than_the_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="5 steps is shorter than the kernel's 7"):
        conv1d(_random(1, 5, 4), _random(4, 4, 4), dilation=2)
