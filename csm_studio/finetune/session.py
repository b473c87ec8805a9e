"""The course of a training command: load, read, encode, train; with bars, notes and Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from csm_studio.command import download_line
from csm_studio.options import add_options, command_line, from_namespace

if TYPE_CHECKING:
    from csm_studio.training.config import FullOptions, LoRAOptions
    from csm_studio.training.events import Event

Options = TypeVar("Options", "LoRAOptions", "FullOptions")
_MAX_NOTES = 20


def parse(
    module: str, description: str, settings: type[Options], argv: Sequence[str] | None
) -> Options:
    """Read the command line of a training command into its settings, checked."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    add_options(parser, settings)
    options = from_namespace(settings, parser.parse_args(argv))
    options.validate()
    return options


def train(options: LoRAOptions | FullOptions, module: str) -> None:
    """Run a training command from settings to checkpoints.

    Args:
        options: The settings.
        module: The command's name, for the hint on how to resume.
    """
    # Imported here, so that --help does not wait for MLX.
    from csm_studio.dataset.records import read_dataset
    from csm_studio.model_folder import load_model
    from csm_studio.training.prepare import prepare_data, prepare_model
    from csm_studio.training.run_dir import RunDir, find_resume_point
    from csm_studio.training.trainer import Trainer

    resume = find_resume_point(options.resume_from) if options.resume_from else None
    if resume is not None and options.output_dir == type(options).output_dir:
        # Not told otherwise, a run goes on in its own folder.
        options.output_dir = resume.checkpoint.parent
    RunDir(Path(options.output_dir), "").refuse_if_taken(resume)
    dataset = read_dataset(options.data_path, options.max_samples)
    with download_line() as show_download:
        model = load_model(options.model, progress=show_download)
    assert model.companions is not None
    with _Bar("encoding audio", "clip") as bar:
        data = prepare_data(dataset, model.companions, options, bar.show)
    _print_notes(data.notes)
    prepare_model(model, options)
    display = _Display(options.log_every)
    with _StopOnInterrupt() as interrupt:
        trainer = Trainer(model, data, options, display.on_event, interrupt.is_set, resume)
        ended = trainer.run()
    display.close()
    if ended.outcome == "stopped":
        again = command_line(module, options)
        if options.resume_from is None:
            again += f" --resume-from {ended.checkpoint}"
        print(f"Stopped after step {ended.step}. To go on:\n  {again}")
        raise KeyboardInterrupt
    best = trainer.run_dir.best
    print(f"Finished: {ended.checkpoint}")
    if best is not None:
        print(f"Best by validation: {trainer.run_dir.root / best.name}")
    if trainer.run_dir.kind == "lora":
        use = f'python -m csm_studio.generate "Hello." -o hello.wav --adapter {ended.checkpoint}'
    else:
        use = f'python -m csm_studio.generate "Hello." -o hello.wav --model {ended.checkpoint}'
    speakers = sorted({clip.speaker_id for clip in dataset.clips} - set(options.mask_speaker_ids))
    print(f"Hear it:\n  {use} --speaker {speakers[0]}")


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes[:_MAX_NOTES]:
        print(f"note: {note}", file=sys.stderr)
    if len(notes) > _MAX_NOTES:
        print(f"note: and {len(notes) - _MAX_NOTES} more.", file=sys.stderr)


class _Bar:
    """A progress bar that appears with its first step and shows (done, total)."""

    def __init__(self, what: str, unit: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=what, unit=unit, disable=None, leave=False)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, done: int, total: int) -> None:
        """Move the bar."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)


class _Display:
    """Draws a run's events: a bar with loss, speed, memory and time left, and one line a check."""

    def __init__(self, log_every: int) -> None:
        from tqdm import tqdm

        self._tqdm = tqdm
        self._log_every = log_every
        self._bar: tqdm | None = None

    def on_event(self, event: Event) -> None:
        """Show one event."""
        from csm_studio.training import events

        if isinstance(event, events.RunStarted):
            self._line(
                f"{event.num_train} conversations to train on, {event.num_validation} held out; "
                f"{event.num_trainable:,} of {event.num_parameters:,} parameters train."
            )
            self._bar = self._tqdm(
                desc="training",
                unit="step",
                total=event.total_steps,
                initial=event.first_step,
                disable=None,
            )
        elif isinstance(event, events.StepDone) and self._bar is not None:
            state = (
                f"loss {event.loss:.3f}, {event.frames_per_s:.0f} frames/s, "
                f"{event.peak_memory_bytes / 2**30:.2f} GB"
            )
            self._bar.set_postfix_str(state)
            self._bar.update(1)
            # Where no terminal shows the bar, a line now and then does.
            if self._bar.disable and event.step % self._log_every == 0:
                self._line(f"step {event.step}: {state}, {event.time_left_s:.0f} s left")
        elif isinstance(event, events.Validated):
            best = ", the best so far" if event.is_best else ""
            self._line(f"step {event.step}: validation loss {event.loss:.4f}{best}")
        elif isinstance(event, events.CheckpointSaved):
            self._line(f"step {event.step}: saved {event.path}")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, text: str) -> None:
        self._tqdm.write(text, file=sys.stderr)


class _StopOnInterrupt:
    """Turns the first Ctrl-C into a wish to stop after the step; a second one stops at once."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> _StopOnInterrupt:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def is_set(self) -> bool:
        """Tell whether a stop was asked for."""
        return self._asked

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("\nStopping after this step (Ctrl-C again: at once) ...", file=sys.stderr)
