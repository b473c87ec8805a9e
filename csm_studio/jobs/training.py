"""A training as a background job: it outlives pages, and is watched and steered from any thread."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from csm_studio.errors import CsmStudioError, JobError
from csm_studio.jobs import state as states
from csm_studio.jobs.advice import advise, explain, is_disk_full, is_out_of_memory
from csm_studio.jobs.curves import read_metrics
from csm_studio.jobs.state import JobState, RunningMean, with_event, with_line
from csm_studio.jobs.worker import Worker
from csm_studio.training import events
from csm_studio.training.config import FullOptions, LoRAOptions, options_from_manifest
from csm_studio.training.course import prepare_course
from csm_studio.training.run_dir import RunDir, is_training, read_manifest
from csm_studio.training.trainer import Trainer

Options = LoRAOptions | FullOptions


class TrainingRunner:
    """Starts trainings on a worker, one at a time. Make one per worker.

    Args:
        worker: Runs them, and what is urgent between their steps.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._job: TrainingJob | None = None

    @property
    def job(self) -> TrainingJob | None:
        """The training that runs or was the last to run, or None."""
        return self._job

    def start(self, options: Options) -> TrainingJob:
        """Begin a training in the background.

        Args:
            options: Its settings; `output_dir` is the run's folder.

        Raises:
            JobError: Another training is running, or the worker is closed.
            OptionError: A setting is out of bounds, or contradicts another.
            TrainingError: The folder holds a run already.
        """
        options.validate()
        with self._lock:
            self._refuse_if_busy()
            if options.resume_from is None:
                RunDir(options.output_dir, "").refuse_if_taken(None)
            self._job = TrainingJob(self._worker, options)
            return self._job

    def resume(self, run_dir: Path, changes: Mapping[str, Any] | None = None) -> TrainingJob:
        """Go on with a run from its newest checkpoint, in its own folder.

        Args:
            run_dir: The run's folder.
            changes: Settings to change; those that decide what a step computes cannot be.
                `data_path` and `model` are needed where these were moved since.

        Raises:
            JobError: There is no run, it is being trained, or another is.
            OptionError: A setting is out of bounds, or not known.
            TrainingError: The folder's manifest is damaged.
        """
        manifest = read_manifest(run_dir)
        if not manifest:
            raise JobError(f"{run_dir}: holds no run. Start a new one.")
        if is_training(run_dir, manifest):
            raise JobError(f"{run_dir}: is being trained already. Stop that first.")
        settings = {"output_dir": run_dir, "resume_from": run_dir, **(changes or {})}
        options = options_from_manifest(manifest)
        if unknown := sorted(settings.keys() - vars(options).keys()):
            raise JobError(f"{', '.join(unknown)}: no setting of a {manifest['kind']} training.")
        return self.start(dataclasses.replace(options, **settings))

    def _refuse_if_busy(self) -> None:
        if self._job is None or self._job.state.is_over:
            return
        now = self._job.state
        progress = f", step {now.step} of {now.total_steps}" if now.total_steps else ""
        raise JobError(
            f"A training is running already ({now.name}: {now.phase_text}{progress}). "
            "Stop it, or wait until it has finished."
        )


class TrainingJob:
    """One training on the worker. All that is public may be used from any thread.

    Args:
        worker: Runs it.
        options: Its settings, checked.
    """

    def __init__(self, worker: Worker, options: Options) -> None:
        self.options = options
        self._worker = worker
        self._lock = threading.Lock()
        self._stop_wanted = threading.Event()
        self._save_wanted = threading.Event()
        self._mean = RunningMean()
        self._trainer: Trainer | None = None
        kind = "lora" if isinstance(options, LoRAOptions) else "full"
        self._state = JobState(Path(options.output_dir), kind, started_at=time.time())
        self._future = worker.submit(self._run, label=f"training {self._state.name}")
        self._future.add_done_callback(self._note_cancelled)

    @property
    def state(self) -> JobState:
        """A snapshot of how it stands."""
        with self._lock:
            return self._state

    def stop(self) -> None:
        """Ask for the end after this step, with a checkpoint to resume from.

        Before the first step there is nothing to save: the job then ends at once.
        """
        self._stop_wanted.set()
        if not self._future.cancel() and not self.state.is_over:
            self._update(is_stopping=True)

    def save_now(self) -> None:
        """Ask for a checkpoint after this step. The training goes on, its result unchanged."""
        if not self.state.is_over:
            self._save_wanted.set()
            self._update(is_save_wanted=True)

    def wait(self, timeout_s: float | None = None) -> JobState:
        """Wait for the end, at most so long, and return how it stands then."""
        concurrent.futures.wait([self._future], timeout_s)
        return self.state

    def _run(self) -> None:
        """Train; on the worker's thread. What goes wrong is told by the state."""
        try:
            self._train()
        except _StoppedEarlyError:
            self._update(phase=states.STOPPED, line="Stopped before the first step.")
        except BaseException as error:
            self._fail(error)
        finally:
            self._trainer = None
            # The model and its optimizer hang in cycles: the next training needs their memory.
            gc.collect()
            mx.clear_cache()

    def _train(self) -> None:
        course = prepare_course(
            self.options, began=self._began, downloaded=self._downloaded, encoded=self._encoded
        )
        for note in course.data.notes:
            self._update(line=note)
        self._pause()
        self._trainer = course.trainer(self._on_event, self._should_stop, self._take_save_wish)
        self._trainer.run()

    def _began(self, phase: str) -> None:
        self._update(phase=phase, detail="", line=f"{phase} ...")
        self._pause()

    def _downloaded(self, done: int, total: int | None, name: str) -> None:
        of_all = f" of {total / 1e6:,.0f}" if total else ""
        self._update(detail=f"downloading {name}, {done / 1e6:,.0f}{of_all} MB")
        self._pause()

    def _encoded(self, done: int, total: int) -> None:
        self._update(num_encoded=done, num_clips=total)
        self._pause()

    def _pause(self) -> None:
        """Let what is urgent run, and end here if a stop was asked for."""
        self._worker.breathe()
        if self._should_stop():
            raise _StoppedEarlyError

    def _on_event(self, event: events.Event) -> None:
        if isinstance(event, events.RunStarted) and event.first_step > 0:
            known = read_metrics(self.state.run_dir).smoothed_loss.value
            self._mean = RunningMean(float(known[-1]) if known.size else None)
        elif isinstance(event, events.StepDone):
            self._mean.add(event.loss)
        with self._lock:
            new = with_event(self._state, event, self._mean.value)
            if isinstance(event, events.StepDone) and event.step % self.options.log_every == 0:
                new = with_line(new, events.line(event))
            self._state = dataclasses.replace(new, revision=new.revision + 1)
        if isinstance(event, (events.RunStarted, events.CheckpointSaved)):
            self._show_checkpoints()
        elif isinstance(event, events.StepDone):
            self._worker.breathe()

    def _show_checkpoints(self) -> None:
        assert self._trainer is not None
        run_dir = self._trainer.run_dir
        self._update(
            checkpoints=tuple(run_dir.root / saved.name for saved in run_dir.checkpoints),
            best=run_dir.root / run_dir.best.name if run_dir.best else None,
            is_save_wanted=self._save_wanted.is_set(),
        )

    def _should_stop(self) -> bool:
        return self._stop_wanted.is_set() or self._worker.is_closing

    def _take_save_wish(self) -> bool:
        is_wanted = self._save_wanted.is_set()
        self._save_wanted.clear()
        return is_wanted

    def _fail(self, error: BaseException) -> None:
        is_expected = (
            isinstance(error, CsmStudioError) or is_out_of_memory(error) or is_disk_full(error)
        )
        has_checkpoint = bool(self.state.checkpoints) or self.options.resume_from is not None
        message = explain(error) if is_expected else f"{type(error).__name__}: {error}"
        self._update(
            phase=states.FAILED if isinstance(error, Exception) else states.INTERRUPTED,
            error=message,
            advice=advise(error, self.options, has_checkpoint),
            traceback=None if is_expected else "".join(traceback.format_exception(error)),
            time_left_s=None,
            line=message,
        )

    def _note_cancelled(self, future: concurrent.futures.Future[None]) -> None:
        if future.cancelled():
            self._update(phase=states.STOPPED, line="Stopped before it began.")

    def _update(self, line: str = "", **changes: Any) -> None:
        with self._lock:
            new = dataclasses.replace(self._state, **changes, revision=self._state.revision + 1)
            self._state = with_line(new, line)


class _StoppedEarlyError(Exception):
    """A stop was asked for before the first step."""
