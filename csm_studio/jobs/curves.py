"""The curves of a run, from its metrics log: read once, then only what was added.

A log of 100,000 lines is kept as numbers; what is handed out is thinned to what a plot can show.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from array import array
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from csm_studio.jobs.state import RunningMean
from csm_studio.training.run_dir import METRICS

MOST_POINTS = 1000
"""Points of a curve, more than a plot is wide in pixels."""

_STEP_FIGURES = ("loss", "learning_rate", "grad_norm", "frames_per_s", "peak_memory_bytes")
_FIGURES = (*_STEP_FIGURES, "smoothed_loss", "validation_loss")
_TAIL_BYTES = 256
_LOGS_KEPT = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """One figure over the steps.

    Attributes:
        step: Int64 (N,), ascending.
        value: Float64 (N,).
    """

    step: np.ndarray
    value: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Curves:
    """The figures of a run. Each is thinned for itself, so that its own extremes stay.

    Attributes:
        loss: Mean over the steps since the line before.
        smoothed_loss: Its running mean.
        validation_loss: Over all that is held out; the first is that of the base model.
        learning_rate: Of the step.
        grad_norm: Mean since the line before, before clipping.
        frames_per_s: Lately.
        peak_memory_bytes: Most memory that MLX held.
        last_step: The newest step in the log, 0 without any.
    """

    loss: Curve
    smoothed_loss: Curve
    validation_loss: Curve
    learning_rate: Curve
    grad_norm: Curve
    frames_per_s: Curve
    peak_memory_bytes: Curve
    last_step: int


class MetricsReader:
    """Reads the curves of runs, remembering what it has read of each. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._logs: OrderedDict[Path, _Log] = OrderedDict()

    def read(self, run_dir: Path, most_points: int = MOST_POINTS) -> Curves:
        """Return a run's curves as of now; empty where it has no log yet.

        Args:
            run_dir: The run's folder.
            most_points: Points of each curve, at least 4. The first, the last and the extremes
                in between are kept.
        """
        path = run_dir / METRICS
        with self._lock:
            log = self._logs.setdefault(path, _Log())
            self._logs.move_to_end(path)
            if len(self._logs) > _LOGS_KEPT:
                self._logs.popitem(last=False)
            log.update(path)
            return log.curves(most_points)


def read_metrics(run_dir: Path, most_points: int = MOST_POINTS) -> Curves:
    """Return a run's curves, reading its whole log. To follow a run, keep a `MetricsReader`."""
    return MetricsReader().read(run_dir, most_points)


def thin(step: np.ndarray, value: np.ndarray, most_points: int) -> Curve:
    """Return at most so many points: the first, the last, and the extremes of equal stretches.

    Args:
        step: Int64 (N,).
        value: Float64 (N,).
        most_points: At least 4.
    """
    if most_points < 4:
        raise ValueError(f"most_points is {most_points}; it must be at least 4")
    num_points = value.size
    if num_points <= most_points:
        return Curve(step, value)
    num_bins = (most_points - 2) // 2
    width = -(-num_points // num_bins)
    padding = -num_points % width
    # What is padded, or undefined, is never an extreme.
    lowest, highest = (
        np.pad(np.where(np.isnan(value), filler, value), (0, padding), constant_values=filler)
        for filler in (np.inf, -np.inf)
    )
    starts = np.arange(0, num_points + padding, width)
    chosen = np.concatenate(
        [
            [0, num_points - 1],
            starts + lowest.reshape(-1, width).argmin(axis=1),
            starts + highest.reshape(-1, width).argmax(axis=1),
        ]
    )
    chosen = np.unique(chosen[chosen < num_points])
    return Curve(step[chosen], value[chosen])


class _Log:
    """What was read of one metrics file."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._shown: dict[int, Curves] = {}
        self._offset = 0
        self._tail = b""
        self._mean = RunningMean()
        self._last_step = 0
        self._steps = {name: array("q") for name in _FIGURES}
        self._values = {name: array("d") for name in _FIGURES}

    def update(self, path: Path) -> None:
        """Read what was added. A file that is another than before is read anew."""
        try:
            with path.open("rb") as stream:
                start = self._offset - len(self._tail)
                stream.seek(start)
                if stream.read(len(self._tail)) != self._tail:
                    # A resumed run drops the lines past the step that it goes on from.
                    self._forget()
                    stream.seek(0)
                added = stream.read()
        except FileNotFoundError:
            self._forget()
            return
        # A line without its end is being written.
        added = added[: added.rfind(b"\n") + 1]
        if added:
            self._shown = {}
        for line in added.splitlines():
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue  # A line cut short by a crash.
        self._offset += len(added)
        self._tail = (self._tail + added)[-_TAIL_BYTES:]

    def _take(self, line: dict[str, Any]) -> None:
        step = int(line["step"])
        if line["event"] == "validation":
            self._add("validation_loss", step, float(line["loss"]))
        elif line["event"] == "step":
            values = {name: float(line[name]) for name in _STEP_FIGURES}
            num_steps = max(1, step - self._last_step)
            values["smoothed_loss"] = self._mean.add(values["loss"], num_steps)
            for name, value in values.items():
                self._add(name, step, value)
            self._last_step = step

    def _add(self, name: str, step: int, value: float) -> None:
        self._steps[name].append(step)
        self._values[name].append(value)

    def curves(self, most_points: int) -> Curves:
        """Return what was read, thinned."""
        if most_points not in self._shown:
            self._shown[most_points] = self._thinned(most_points)
        return self._shown[most_points]

    def _thinned(self, most_points: int) -> Curves:
        curves = {
            name: thin(
                np.array(self._steps[name], np.int64),
                np.array(self._values[name], np.float64),
                most_points,
            )
            for name in _FIGURES
        }
        return Curves(**curves, last_step=self._last_step)
