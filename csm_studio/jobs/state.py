"""What a training job shows of itself: an immutable snapshot, and how events change it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from csm_studio.jobs.advice import Advice
from csm_studio.training import events
from csm_studio.training.course import ENCODING, LOADING

WAITING = "waiting"
TRAINING = "training"
SAVING = "saving"
FINISHED = "finished"
STOPPED = "stopped"
FAILED = "failed"
INTERRUPTED = "interrupted"
PHASES = (WAITING, LOADING, ENCODING, TRAINING, SAVING, FINISHED, STOPPED, FAILED, INTERRUPTED)
_OVER = (FINISHED, STOPPED, FAILED, INTERRUPTED)

LOG_LINES = 200
"""Lines of the log that a snapshot holds."""

_MEMORY_STEPS = 50


@dataclasses.dataclass(frozen=True)
class JobState:
    """A training job at one moment.

    Attributes:
        run_dir: The run's folder. It is made when training begins.
        kind: `lora` or `full`.
        phase: One of `PHASES`; `phase_text` is for people.
        detail: What is downloaded and how far that is, while it is.
        num_encoded: Clips whose codes are there, of `num_clips`.
        step: Optimizer steps taken, of `total_steps`.
        epoch: Counted from 1; 0 before the first step.
        loss: Of the last step, or None.
        smoothed_loss: Its running mean.
        validation_loss: The last one, or None.
        learning_rate: Of the last step.
        grad_norm: Of the last step, before clipping.
        time_left_s: Estimate, or None.
        started_at: Unix time.
        checkpoints: What is on disk now, oldest first.
        best: The one with the lowest validation loss, or None.
        is_stopping: A stop was asked for.
        is_save_wanted: A save was asked for, and not begun.
        error: Why it failed, in plain words.
        advice: What would mend it.
        traceback: Of an error that is a defect of the program.
        log: The last lines.
        revision: Grows with every change.
    """

    run_dir: Path
    kind: str
    phase: str = WAITING
    detail: str = ""
    num_encoded: int = 0
    num_clips: int = 0
    step: int = 0
    total_steps: int = 0
    epoch: int = 0
    loss: float | None = None
    smoothed_loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    frames_per_s: float | None = None
    peak_memory_bytes: int | None = None
    time_left_s: float | None = None
    started_at: float = 0.0
    checkpoints: tuple[Path, ...] = ()
    best: Path | None = None
    is_stopping: bool = False
    is_save_wanted: bool = False
    error: str | None = None
    advice: Advice | None = None
    traceback: str | None = None
    log: tuple[str, ...] = ()
    revision: int = 0

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.run_dir.name

    @property
    def phase_text(self) -> str:
        """The phase as shown, such as `encoding audio 12 of 56`."""
        if self.phase == ENCODING and self.num_clips:
            return f"{self.phase} {self.num_encoded} of {self.num_clips}"
        return f"{self.phase}: {self.detail}" if self.detail else self.phase

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.phase in _OVER


def with_line(state: JobState, text: str) -> JobState:
    """Return a state with a line more in its log, unless the text is empty."""
    if not text:
        return state
    return dataclasses.replace(state, log=(*state.log, text)[-LOG_LINES:])


def with_event(state: JobState, event: events.Event, smoothed_loss: float | None) -> JobState:
    """Return a state after an event of the trainer.

    Args:
        state: Before it.
        event: What happened.
        smoothed_loss: The running mean of the loss, after it.
    """
    if isinstance(event, events.RunStarted):
        state = dataclasses.replace(
            state, phase=TRAINING, step=event.first_step, total_steps=event.total_steps
        )
    elif isinstance(event, events.StepDone):
        return dataclasses.replace(
            state,
            phase=TRAINING,
            step=event.step,
            epoch=event.epoch,
            loss=event.loss,
            smoothed_loss=smoothed_loss,
            learning_rate=event.learning_rate,
            grad_norm=event.grad_norm,
            frames_per_s=event.frames_per_s,
            peak_memory_bytes=event.peak_memory_bytes,
            time_left_s=event.time_left_s,
        )
    elif isinstance(event, events.SaveBegun):
        state = dataclasses.replace(state, phase=SAVING)
    elif isinstance(event, events.Validated):
        state = dataclasses.replace(state, validation_loss=event.loss)
    elif isinstance(event, events.CheckpointSaved):
        state = dataclasses.replace(state, phase=TRAINING)
    elif isinstance(event, events.RunEnded):
        state = dataclasses.replace(state, phase=event.outcome, time_left_s=None)
    return with_line(state, events.line(event))


class RunningMean:
    """An exponential mean of a loss over about fifty steps, the same however often it is told."""

    def __init__(self, value: float | None = None) -> None:
        self.value = value

    def add(self, loss: float, num_steps: int = 1) -> float:
        """Take in the mean loss of so many steps; return the running mean."""
        if self.value is None:
            self.value = loss
        kept = (1 - 1 / _MEMORY_STEPS) ** num_steps
        self.value = kept * self.value + (1 - kept) * loss
        return self.value
