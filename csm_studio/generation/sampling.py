"""Drawing one code from logits: pure functions from logits to logits, and a keyed draw at the end.

A code ruled out has the logit -inf. Every function works on float32 (B, V).
"""

from __future__ import annotations

import math

import mlx.core as mx

from csm_studio.generation.settings import SamplingOptions


def sample(logits: mx.array, options: SamplingOptions, key: mx.array) -> mx.array:
    """Draw one code per row.

    Args:
        logits: Float (B, V); -inf rules a code out.
        options: Checked settings.
        key: PRNG key. The same key and logits give the same codes on any thread.

    Returns:
        Integer (B,).
    """
    logits = logits.astype(mx.float32)
    if options.temperature == 0:
        return mx.argmax(logits, axis=-1)
    return mx.random.categorical(filter_logits(logits, options), key=key)


def filter_logits(logits: mx.array, options: SamplingOptions) -> mx.array:
    """Return float32 logits (B, V) after temperature, top-k, top-p and min-p, in that order."""
    logits = logits / options.temperature
    if 0 < options.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p < 1:
        logits = keep_top_p(logits, options.top_p)
    if options.min_p > 0:
        logits = keep_min_p(logits, options.min_p)
    return logits


def keep_top_k(logits: mx.array, top_k: int) -> mx.array:
    """Keep the `top_k` largest logits of each row, and what ties with the smallest of them."""
    smallest = mx.min(mx.topk(logits, top_k, axis=-1), axis=-1, keepdims=True)
    return _keep_from(logits, smallest)


def keep_top_p(logits: mx.array, top_p: float) -> mx.array:
    """Keep the fewest codes whose probabilities sum to `top_p`, and what ties with the last.

    Source: Holtzman et al. 2020, arXiv:1904.09751 (nucleus sampling).
    """
    descending = -mx.sort(-logits, axis=-1)
    probabilities = mx.softmax(descending, axis=-1)
    mass_before = mx.cumsum(probabilities, axis=-1, inclusive=False)
    kept = mx.where(mass_before < top_p, descending, mx.inf)
    return _keep_from(logits, mx.min(kept, axis=-1, keepdims=True))


def keep_min_p(logits: mx.array, min_p: float) -> mx.array:
    """Keep codes at least `min_p` times as likely as the likeliest.

    Source: Nguyen et al. 2024, arXiv:2407.01082.
    """
    return _keep_from(logits, mx.max(logits, axis=-1, keepdims=True) + math.log(min_p))


def _keep_from(logits: mx.array, smallest: mx.array) -> mx.array:
    return mx.where(logits >= smallest, logits, -mx.inf)
