"""The loss of a CSM: cross entropy of codebook 0 from the backbone, of the rest from the depth
decoder, over scored frames only.

A loss is a weighted sum over codebooks of mean cross entropies. Two published weightings exist:
`csm-mlx` (w L0 + sum L_i) / K and `transformers` L0 + mean L_i. All means weigh by frame count
over a whole optimizer step, so that splitting a step into micro-batches changes nothing.
"""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from csm_studio.dataset.batches import Batch
from csm_studio.models.csm import CSM


@dataclasses.dataclass(frozen=True)
class CodebookWeights:
    """Weights of the mean cross entropies in the loss.

    Attributes:
        first: Of codebook 0.
        other: Of each of the codebooks 1 to K - 1.
    """

    first: float
    other: float

    @classmethod
    def csm_mlx(cls, num_codebooks: int, first_codebook_weight: float = 1.0) -> CodebookWeights:
        """(w L0 + sum L_i) / K."""
        return cls(first_codebook_weight / num_codebooks, 1.0 / num_codebooks)

    @classmethod
    def transformers(
        cls, num_codebooks: int, first_codebook_weight: float = 1.0
    ) -> CodebookWeights:
        """w L0 + mean L_i."""
        return cls(first_codebook_weight, 1.0 / (num_codebooks - 1))


@dataclasses.dataclass(frozen=True)
class DepthSample:
    """Which of a batch's targets the depth decoder is run on.

    Attributes:
        chosen: Int32 (n,), indices into `Batch.targets`.
        scale: Number of targets over n: makes the sum over the chosen an unbiased estimate of the
            sum over all.
    """

    chosen: np.ndarray
    scale: float

    @classmethod
    def draw(cls, num_targets: int, ratio: float, rng: np.random.Generator) -> DepthSample:
        """Choose a share `ratio` of the targets (at least one) without replacement."""
        num_chosen = min(num_targets, max(1, round(num_targets * ratio)))
        if num_chosen == num_targets:
            return cls(np.arange(num_targets, dtype=np.int32), 1.0)
        chosen = rng.choice(num_targets, num_chosen, replace=False)
        return cls(np.sort(chosen).astype(np.int32), num_targets / num_chosen)


def cross_entropies(model: CSM, batch: Batch, depth: DepthSample) -> tuple[mx.array, mx.array]:
    """Compute the cross entropy of every scored code.

    Args:
        model: The model.
        batch: N targets.
        depth: n of them, for the depth decoder.

    Returns:
        Codebook 0, float32 (N,), and codebooks 1 to K - 1, float32 (n, K - 1), in nats.
    """
    num_positions = batch.tokens.shape[1]
    tokens = mx.array(batch.tokens)
    hidden = model.hidden_states(tokens, mx.array(batch.mask))
    # The state one position before a frame predicts it. Only these get logits.
    before = mx.array(batch.targets[:, 0] * num_positions + batch.targets[:, 1] - 1)
    states = hidden.reshape(-1, hidden.shape[-1])[before]
    codes = mx.array(batch.tokens[batch.targets[:, 0], batch.targets[:, 1], :-1])
    first = nn.losses.cross_entropy(model.codebook0_logits(states).astype(mx.float32), codes[:, 0])
    if len(depth.chosen) < len(batch.targets):
        chosen = mx.array(depth.chosen)
        states, codes = states[chosen], codes[chosen]
    logits = model.depth_logits(states, codes).astype(mx.float32)
    return first, nn.losses.cross_entropy(logits, codes[:, 1:])


def batch_loss(
    model: CSM, batch: Batch, depth: DepthSample, weights: CodebookWeights, num_targets: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Return a micro-batch's share of the loss of an optimizer step.

    Args:
        model: The model.
        batch: The micro-batch.
        depth: The frames that the depth decoder is run on.
        weights: Weights of the codebooks.
        num_targets: Targets of the whole step; the shares of its micro-batches add up.

    Returns:
        Three float32 scalars: the loss, the mean cross entropy of codebook 0 and that of the
        other codebooks, each divided by the step's targets.
    """
    first, others = cross_entropies(model, batch, depth)
    first_mean = first.sum() / num_targets
    others_sum = others.sum() * (depth.scale / num_targets)
    loss = weights.first * first_mean + weights.other * others_sum
    return loss, first_mean, others_sum / others.shape[1]
