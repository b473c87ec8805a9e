"""What a trainer tells while it runs. It prints nothing and draws nothing itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class RunStarted:
    """Training begins, or goes on at `first_step` > 0."""

    first_step: int
    total_steps: int
    num_train: int
    num_validation: int
    num_trainable: int
    num_parameters: int


@dataclasses.dataclass(frozen=True)
class StepDone:
    """An optimizer step was taken.

    Attributes:
        step: Counted from 1.
        epoch: Counted from 1.
        loss: Of this step's batch.
        codebook0_loss: Mean cross entropy of codebook 0, in nats.
        depth_loss: Mean cross entropy of the other codebooks, in nats.
        grad_norm: Before clipping.
        frames_per_s: Positions trained on per second, lately.
        peak_memory_bytes: Most memory that MLX held.
        time_left_s: Estimate for the rest of the run.
    """

    step: int
    epoch: int
    loss: float
    codebook0_loss: float
    depth_loss: float
    learning_rate: float
    grad_norm: float
    frames_per_s: float
    peak_memory_bytes: int
    time_left_s: float


@dataclasses.dataclass(frozen=True)
class SaveBegun:
    """A checkpoint is about to be validated and written."""

    step: int


@dataclasses.dataclass(frozen=True)
class Validated:
    """The loss over all of the held-out conversations."""

    step: int
    epoch: int
    loss: float
    codebook0_loss: float
    depth_loss: float
    is_best: bool


@dataclasses.dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is on disk, complete."""

    path: Path
    step: int


@dataclasses.dataclass(frozen=True)
class RunEnded:
    """The run is over: `finished`, or `stopped` on request with a checkpoint to resume from."""

    outcome: str
    step: int
    checkpoint: Path


Event = RunStarted | StepDone | SaveBegun | Validated | CheckpointSaved | RunEnded
EventCallback = Callable[[Event], None]


def figures(done: StepDone) -> str:
    """Return loss, speed and memory of a step in a few words."""
    return (
        f"loss {done.loss:.3f}, {done.frames_per_s:.0f} frames/s, "
        f"{done.peak_memory_bytes / 2**30:.2f} GB"
    )


def line(event: Event) -> str:
    """Return an event as one plain line, empty for those that say nothing on their own."""
    if isinstance(event, RunStarted):
        return (
            f"{event.num_train} conversations to train on, {event.num_validation} held out; "
            f"{event.num_trainable:,} of {event.num_parameters:,} parameters train."
        )
    if isinstance(event, StepDone):
        return f"step {event.step}: {figures(event)}, {event.time_left_s:.0f} s left"
    if isinstance(event, Validated):
        best = ", the best so far" if event.is_best else ""
        return f"step {event.step}: validation loss {event.loss:.4f}{best}"
    if isinstance(event, CheckpointSaved):
        return f"step {event.step}: saved {event.path}"
    return ""
