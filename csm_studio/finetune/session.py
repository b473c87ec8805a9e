"""The course of a training command: load, read, encode, train; with bars, notes and Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
import types
from collections.abc import Sequence
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
    from csm_studio.training.course import prepare_course

    with download_line() as show_download, _Bar("encoding audio", "clip") as bar:
        course = prepare_course(options, downloaded=show_download, encoded=bar.show)
    _print_notes(course.data.notes)
    display = _Display(options.log_every)
    with _StopOnInterrupt() as interrupt:
        trainer = course.trainer(display.on_event, interrupt.is_set)
        ended = trainer.run()
    display.close()
    if ended.outcome == "stopped":
        again = command_line(module, course.options)
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
    print(f"Hear it:\n  {use} --speaker {course.speakers[0]}")


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes[:_MAX_NOTES]:
        print(f"note: {note}", file=sys.stderr)
    if len(notes) > _MAX_NOTES:
        print(f"note: and {len(notes) - _MAX_NOTES} more.", file=sys.stderr)


class _Bar:
    """A progress bar that appears with its first step and shows (done, total)."""

    def __init__(self, what: str, unit: str) -> None:
        from tqdm import tqdm

        self._make = lambda: tqdm(desc=what, unit=unit, disable=None, leave=False)
        self._bar: tqdm | None = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int, total: int) -> None:
        """Move the bar."""
        if self._bar is None:
            self._bar = self._make()
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
            self._line(events.line(event))
            self._bar = self._tqdm(
                desc="training",
                unit="step",
                total=event.total_steps,
                initial=event.first_step,
                disable=None,
            )
        elif isinstance(event, events.StepDone) and self._bar is not None:
            self._bar.set_postfix_str(events.figures(event))
            self._bar.update(1)
            # Where no terminal shows the bar, a line now and then does.
            if self._bar.disable and event.step % self._log_every == 0:
                self._line(events.line(event))
        elif line := events.line(event):
            self._line(line)

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
