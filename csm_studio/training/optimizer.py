"""The optimizer and the course of its learning rate."""

from __future__ import annotations

import math

import mlx.optimizers as optim

from csm_studio.training.config import TrainingOptions


def make_optimizer(options: TrainingOptions) -> optim.Optimizer:
    """Return the optimizer that the settings name, without state."""
    rate, decay = options.learning_rate, options.weight_decay
    if options.optimizer == "adamw":
        return optim.AdamW(learning_rate=rate, weight_decay=decay, bias_correction=True)
    if options.optimizer == "adam":
        return optim.Adam(learning_rate=rate, bias_correction=True)
    return optim.SGD(learning_rate=rate, weight_decay=decay)


def learning_rate(options: TrainingOptions, step: int, total_steps: int) -> float:
    """Return the rate of a step: a linear warm-up to the peak, then the chosen course.

    Args:
        options: Peak, warm-up and course.
        step: Counted from 1.
        total_steps: Of the run; linear and cosine courses end there.
    """
    peak, warmup = options.learning_rate, options.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if options.lr_schedule == "constant":
        return peak
    done = (step - warmup - 1) / max(total_steps - warmup, 1)
    if options.lr_schedule == "linear":
        return peak * (1 - done)
    return peak * 0.5 * (1 + math.cos(math.pi * done))
