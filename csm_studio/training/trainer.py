"""The training loop: LoRA or full finetuning, resumable to the bit.

Everything random is a function of (seed, step), so the state to resume from is the weights, the
optimizer's arrays and the step. The trainer prints nothing; it reports events.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from csm_studio.checkpoints.weights import flatten, read_weights
from csm_studio.dataset.batches import Batch, build_batch, epoch_batches
from csm_studio.errors import LossNotFiniteError, TrainingError
from csm_studio.models.adapters import adapter_tensors
from csm_studio.models.csm import CSM
from csm_studio.models.lora import base_fingerprint
from csm_studio.training import events
from csm_studio.training.config import FullOptions, LoRAOptions
from csm_studio.training.loss import (
    CodebookWeights,
    DepthSample,
    batch_loss,
    cross_entropies,
)
from csm_studio.training.optimizer import learning_rate, make_optimizer
from csm_studio.training.prepare import TrainingData
from csm_studio.training.run_dir import Checkpoint, ResumePoint, RunDir

# Settings that may change when a run goes on: they decide when to stop, log and save, not what a
# step computes.
FREE_ON_RESUME = frozenset(
    {"data_path", "output_dir", "model", "epochs", "save_every", "keep_last", "log_every"}
    | {"resume_from", "cache_dir", "pretrained_path", "gradient_checkpointing"}
)
_SPEED_WINDOW_STEPS = 20


class Trainer:
    """Trains a prepared model on prepared data.

    Args:
        model: From `prepare_model`.
        data: From `prepare_data`.
        options: The settings that both were prepared with.
        on_event: Called with each event, on this thread.
        should_stop: Asked between steps; True ends the run with a checkpoint to resume from.
        resume: From `find_resume_point`, to go on with a run.
        should_save: Asked once between steps; True saves a checkpoint and goes on. What is
            learnt does not depend on it.
    """

    def __init__(
        self,
        model: CSM,
        data: TrainingData,
        options: LoRAOptions | FullOptions,
        on_event: events.EventCallback = lambda event: None,
        should_stop: Callable[[], bool] = lambda: False,
        resume: ResumePoint | None = None,
        should_save: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model = model
        self.data = data
        self.options = options
        self._on_event = on_event
        self._should_stop = should_stop
        self._should_save = should_save
        self._resume = resume
        self._is_lora = isinstance(options, LoRAOptions)
        kind = "lora" if self._is_lora else "full"
        self.run_dir = RunDir(Path(options.output_dir), kind, options.keep_last)
        self._base = model.adapter.base_fingerprint if model.adapter else base_fingerprint(model)
        self._optimizer = make_optimizer(options)
        num_codebooks = model.config.audio_num_codebooks
        weigh = (
            CodebookWeights.csm_mlx if options.loss == "csm-mlx" else CodebookWeights.transformers
        )
        self._weights = weigh(num_codebooks, options.first_codebook_weight)
        num_batches = math.ceil(len(data.train) / options.batch_size)
        self.steps_per_epoch = math.ceil(num_batches / options.grad_accumulation_steps)
        self.total_steps = self.steps_per_epoch * options.epochs
        self._loss_and_grad = nn.value_and_grad(
            model, lambda *arguments: batch_loss(model, *arguments)
        )
        self._epoch_order: tuple[int, list[list[int]]] = (-1, [])

    def run(self) -> events.RunEnded:
        """Train until the last epoch is done or a stop is asked for.

        Returns:
            How the run ended, with its last checkpoint.

        Raises:
            TrainingError: The folder is taken, the resume point does not fit, or the loss is not
                finite (the last checkpoint stays).
        """
        first_step = self._restore() if self._resume else 0
        if first_step >= self.total_steps:
            raise TrainingError(
                f"The run has taken all its {self.total_steps} steps already. Raise --epochs to "
                "train further."
            )
        description = {**self._describe(first_step), "total_steps": self.total_steps}
        self.run_dir.claim(description, self._resume)
        try:
            ended = self._loop(first_step)
            self.run_dir.mark(ended.outcome)
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            # A full disk must not hide the error that came first.
            with contextlib.suppress(OSError):
                self.run_dir.mark(status, str(error) or type(error).__name__)
            raise
        finally:
            self.run_dir.release()
        self._emit(ended)
        return ended

    def _loop(self, first_step: int) -> events.RunEnded:
        parameters = flatten(self.model.parameters())
        self._emit(
            events.RunStarted(
                first_step=first_step,
                total_steps=self.total_steps,
                num_train=len(self.data.train),
                num_validation=len(self.data.validation),
                num_trainable=sum(
                    value.size for value in flatten(self.model.trainable_parameters()).values()
                ),
                num_parameters=sum(value.size for value in parameters.values()),
            )
        )
        if first_step == 0:
            self._validate(0)
        speed = _Speed(self.total_steps)
        window: list[events.StepDone] = []
        mx.reset_peak_memory()
        for step in range(first_step + 1, self.total_steps + 1):
            speed.start()
            done, num_frames = self._step(step)
            frames_per_s, time_left_s = speed.finish(step, num_frames)
            done = dataclasses.replace(done, frames_per_s=frames_per_s, time_left_s=time_left_s)
            self._emit(done)
            window.append(done)
            if step % self.options.log_every == 0 or step == self.total_steps:
                self._log_steps(window)
                window = []
            ends_epoch = step % self.steps_per_epoch == 0
            on_schedule = self.options.save_every and step % self.options.save_every == 0
            stops = step < self.total_steps and self._should_stop()
            saves = self._should_save()
            if ends_epoch or on_schedule or stops or saves:
                checkpoint = self._save(step, ends_epoch)
            if stops:
                return events.RunEnded("stopped", step, checkpoint)
        # The last step ends an epoch, so it was saved.
        return events.RunEnded("finished", self.total_steps, checkpoint)

    def _step(self, step: int) -> tuple[events.StepDone, int]:
        """Take optimizer step `step` (counted from 1); return its report and frame count."""
        options = self.options
        # The second number keeps this stream apart from that of the epochs' order.
        rng = np.random.default_rng([options.seed, 1, step])
        batches = self._batches(step)
        num_targets = sum(len(batch.targets) for batch in batches)
        gradients: Any = None
        values = np.zeros(3)
        for batch in batches:
            depth = DepthSample.draw(len(batch.targets), options.depth_frame_ratio, rng)
            parts, gradient = self._loss_and_grad(batch, depth, self._weights, num_targets)
            gradients = gradient if gradients is None else tree_map(mx.add, gradients, gradient)
            mx.eval(parts, gradients)
            values += [part.item() for part in parts]
        limit = options.max_grad_norm or math.inf
        gradients, norm = optim.clip_grad_norm(gradients, limit)
        if not (np.isfinite(values).all() and math.isfinite(norm.item())):
            raise LossNotFiniteError(
                f"The loss is not finite at step {step} (loss {values[0]:g}, gradient norm "
                f"{norm.item():g}). The last checkpoint is kept. Lower --learning-rate, or set "
                "--max-grad-norm 1 and --warmup-steps."
            )
        rate = learning_rate(self.options, step, self.total_steps)
        self._optimizer.learning_rate = rate
        self._optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self._optimizer.state)
        done = events.StepDone(
            step=step,
            epoch=self._epoch(step),
            loss=float(values[0]),
            codebook0_loss=float(values[1]),
            depth_loss=float(values[2]),
            learning_rate=rate,
            grad_norm=norm.item(),
            frames_per_s=0.0,
            peak_memory_bytes=mx.get_peak_memory(),
            time_left_s=0.0,
        )
        return done, sum(batch.num_frames for batch in batches)

    def _batches(self, step: int) -> list[Batch]:
        epoch = self._epoch(step) - 1
        if self._epoch_order[0] != epoch:
            lengths = [example.num_frames for example in self.data.train]
            order = epoch_batches(lengths, self.options.batch_size, self.options.seed, epoch)
            self._epoch_order = (epoch, order)
        accumulate = self.options.grad_accumulation_steps
        first = (step - 1) % self.steps_per_epoch * accumulate
        chosen = self._epoch_order[1][first : first + accumulate]
        return [build_batch([self.data.train[i] for i in indices]) for indices in chosen]

    def _epoch(self, step: int) -> int:
        return (step - 1) // self.steps_per_epoch + 1

    def _validate(self, step: int) -> float | None:
        """Return the loss over all held-out examples and report it, or None if there are none."""
        held_out = sorted(self.data.validation, key=lambda example: example.num_frames)
        if not held_out:
            return None
        totals = np.zeros(2)
        counts = np.zeros(2)
        size = self.options.batch_size
        for start in range(0, len(held_out), size):
            batch = build_batch(held_out[start : start + size])
            every = DepthSample.draw(len(batch.targets), 1.0, np.random.default_rng(0))
            for index, part in enumerate(cross_entropies(self.model, batch, every)):
                totals[index] += part.sum().item()
                counts[index] += part.size
        first, depth = totals / counts
        num_others = self.model.config.audio_num_codebooks - 1
        loss = float(self._weights.first * first + self._weights.other * num_others * depth)
        best = self.run_dir.best
        is_best = best is None or best.validation_loss is None or loss < best.validation_loss
        epoch = self._epoch(step) if step else 0
        event = events.Validated(step, epoch, loss, float(first), float(depth), is_best)
        self._emit(event)
        self.run_dir.log({"event": "validation", **dataclasses.asdict(event)})
        return loss

    def _save(self, step: int, ends_epoch: bool) -> Path:
        self._emit(events.SaveBegun(step))
        loss = self._validate(step)
        stem = "lora_ckpt" if self._is_lora else "ckpt"
        place = f"epoch_{self._epoch(step)}" if ends_epoch else f"step_{step}"
        checkpoint = Checkpoint(f"{stem}_{place}.safetensors", step, ends_epoch, loss)
        model = self.model
        weights = adapter_tensors(model) if self._is_lora else flatten(model.parameters())
        state = flatten(self._optimizer.state)
        path = self.run_dir.save(checkpoint, weights, self._describe(step), state)
        self._emit(events.CheckpointSaved(path, step))
        self.run_dir.log({"event": "checkpoint", "step": step, "path": path.name})
        return path

    def _describe(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint says of itself: enough to load it and to go on."""
        adapter = dataclasses.asdict(self.model.adapter) if self.model.adapter else {}
        return {
            "kind": self.run_dir.kind,
            **adapter,
            "base_model": _base_model(self.options),
            "base_fingerprint": self._base,
            "config": self.model.config.to_dict(),
            "step": step,
            "epoch": self._epoch(step) if step else 0,
            "data_fingerprint": self.data.fingerprint,
            "training": _plain(dataclasses.asdict(self.options)),
        }

    def _restore(self) -> int:
        """Load the resume point into model and optimizer; return its step."""
        assert self._resume is not None
        described = self._resume.description
        _check_same_run(self._resume, self._describe(0))
        weights = read_weights(self._resume.checkpoint)
        self.model.load_weights(list(weights.items()), strict=False)
        self._optimizer.init(self.model.trainable_parameters())
        self._optimizer.state = tree_unflatten(list(self._resume.optimizer.items()))
        mx.eval(self.model.parameters(), self._optimizer.state)
        return int(described["step"])

    def _log_steps(self, window: list[events.StepDone]) -> None:
        """Log the mean of the losses since the last line, and the last step's other figures."""
        line = dataclasses.asdict(window[-1])
        for name in ("loss", "codebook0_loss", "depth_loss", "grad_norm"):
            line[name] = sum(getattr(done, name) for done in window) / len(window)
        self.run_dir.log({"event": "step", **line})

    def _emit(self, event: events.Event) -> None:
        self._on_event(event)


class _Speed:
    """Frames per second and time left, over the last steps."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._recent: list[tuple[int, float]] = []
        self._started = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def finish(self, step: int, num_frames: int) -> tuple[float, float]:
        """Return (frames per second, seconds left) after a step of so many frames."""
        took_s = time.perf_counter() - self._started
        self._recent = [*self._recent, (num_frames, took_s)][-_SPEED_WINDOW_STEPS:]
        total_s = sum(seconds for _, seconds in self._recent)
        frames_per_s = sum(frames for frames, _ in self._recent) / total_s
        return frames_per_s, total_s / len(self._recent) * (self._total_steps - step)


def _base_model(options: LoRAOptions | FullOptions) -> str:
    """Return what to load to have the base again, from any working folder."""
    if isinstance(options, LoRAOptions) and options.pretrained_path is not None:
        return str(options.pretrained_path.expanduser().resolve())
    path = Path(options.model).expanduser()
    return str(path.resolve()) if path.exists() else options.model


def _check_same_run(resume: ResumePoint, current: Mapping[str, Any]) -> None:
    """Refuse to go on with other data or settings than the run began with."""
    previous = resume.description
    differences = [
        f"{what}: {previous.get(key)} then, {current.get(key)} now"
        for what, key in (
            ("method", "kind"),
            ("base model", "base_fingerprint"),
            ("training data", "data_fingerprint"),
        )
        if previous.get(key) != current.get(key)
    ]
    then, now = previous.get("training", {}), current["training"]
    differences += [
        f"--{name.replace('_', '-')}: {then.get(name)} then, {now[name]} now"
        for name in sorted(now.keys() - FREE_ON_RESUME)
        if then.get(name) != now[name]
    ]
    if differences:
        lines = "\n".join(f"  - {difference}" for difference in differences)
        raise TrainingError(
            f"{resume.checkpoint}: the run cannot go on exactly, since these differ:\n{lines}\n"
            "Use the settings and data it began with, or start a new run (--pretrained-path takes "
            "full weights to start from)."
        )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON can hold them."""
    return {key: str(v) if isinstance(v, Path) else v for key, v in values.items()}
