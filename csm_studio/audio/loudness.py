"""How loud a recording sounds: integrated loudness after ITU-R BS.1770-4."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from csm_studio.constants import SAMPLE_RATE_HZ

SILENT_LUFS = -70.0
"""The absolute gate: what lies below counts as silence, and nothing measures less."""

# The two stages of the K-weighting as the standard prints them for 48 kHz: (b0, b1, b2), (a1, a2).
_SHELF = (
    (1.53512485958697, -2.69169618940638, 1.19839281085285),
    (-1.69065929318241, 0.73248077421585),
)
_HIGH_PASS = ((1.0, -2.0, 1.0), (-1.99004745483398, 0.99007225036621))
_STANDARD_RATE_HZ = 48_000

_OFFSET_LU = -0.691
_RELATIVE_GATE_LU = 10.0
_HOP = SAMPLE_RATE_HZ // 10
_HOPS_PER_BLOCK = 4  # 400 ms, overlapping by 75 %
_PART_SAMPLES = _HOP * 600
_MEMORY_SAMPLES = SAMPLE_RATE_HZ  # the filters have forgotten what lies a second back


def integrated_loudness_lufs(audio: np.ndarray) -> float:
    """Measure the gated loudness of a mono recording.

    A recording shorter than a gating block (400 ms) is measured as one block.

    Args:
        audio: 24 kHz, float (S,).

    Returns:
        LUFS; minus infinity where all is silence.

    Source: ITU-R BS.1770-4, annex 1.
    """
    powers = _block_powers(audio)
    powers = powers[powers > _power(SILENT_LUFS)]
    if powers.size == 0:
        return -math.inf
    gate = _power(_lufs(powers.mean()) - _RELATIVE_GATE_LU)
    return _lufs(powers[powers > gate].mean())


def _block_powers(audio: np.ndarray) -> np.ndarray:
    if audio.size < _HOP * _HOPS_PER_BLOCK:
        return np.array([np.mean(np.square(part)) for part in _weighted_parts(audio)])
    hops = np.concatenate(
        [
            np.square(part[: part.size // _HOP * _HOP]).reshape(-1, _HOP).mean(axis=1)
            for part in _weighted_parts(audio)
        ]
    )
    return np.convolve(hops, np.full(_HOPS_PER_BLOCK, 1 / _HOPS_PER_BLOCK), mode="valid")


def _weighted_parts(audio: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the K-weighted recording a minute at a time, to bound the memory.

    The printed filters are applied by their frequency response, so that they are the same at
    24 kHz; their bilinear transform at that rate would bend the shelf.
    """
    for start in range(0, audio.size, _PART_SAMPLES):
        past = min(start, _MEMORY_SAMPLES)
        part = np.asarray(audio[start - past : start + _PART_SAMPLES], np.float64)
        # A second of silence keeps the end from wrapping round into the beginning.
        size = _fast_size(part.size + _MEMORY_SAMPLES)
        delay = np.exp(-2j * np.pi * np.fft.rfftfreq(size, 1 / SAMPLE_RATE_HZ) / _STANDARD_RATE_HZ)
        response = np.ones_like(delay)
        for (b0, b1, b2), (a1, a2) in (_SHELF, _HIGH_PASS):
            response *= (b0 + b1 * delay + b2 * delay**2) / (1 + a1 * delay + a2 * delay**2)
        weighted = np.fft.irfft(np.fft.rfft(part, size) * response, size)
        yield weighted[past : part.size]


def _fast_size(size: int) -> int:
    """Return the next multiple of a power of two that an FFT is quick at."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step


def _power(lufs: float) -> float:
    return 10 ** ((lufs - _OFFSET_LU) / 10)


def _lufs(power: float) -> float:
    return _OFFSET_LU + 10 * math.log10(power)
