"""The runs in a folder, as their files tell it: what was trained, how far, and what is left."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from csm_studio.errors import TrainingError
from csm_studio.jobs.state import INTERRUPTED
from csm_studio.training.run_dir import (
    MANIFEST,
    METRICS,
    is_training,
    read_manifest,
    state_path,
)

DAMAGED = "damaged"
RUNNING = "running"
_TAIL_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on disk.

    Attributes:
        path: Its weights.
        step: Optimizer steps taken.
        by_epoch: Saved at the end of an epoch, or between.
        validation_loss: None where nothing is held out.
        size_bytes: Weights, description and state to resume from, together.
        can_resume: Whether the state to resume from is there.
    """

    path: Path
    step: int
    by_epoch: bool
    validation_loss: float | None
    size_bytes: int
    can_resume: bool


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """A run on disk.

    Attributes:
        path: Its folder.
        kind: `lora` or `full`.
        status: `running`, `finished`, `stopped`, `failed`, `interrupted` (its process is gone),
            or `damaged` (its manifest cannot be read).
        step: The last step in the log or of a checkpoint.
        total_steps: None for a run of a version that did not keep it.
        last_loss: In the log, or None.
        best: The checkpoint with the lowest validation loss, or None.
        checkpoints: Oldest first.
        created_at: When it was begun, ISO 8601 in UTC, or None.
        base_model: What it started from.
        settings: As in the manifest.
        error: Why it failed, or what is damaged.
        can_resume: Whether steps are left and a checkpoint to go on from.
    """

    path: Path
    kind: str
    status: str
    step: int = 0
    total_steps: int | None = None
    last_loss: float | None = None
    best: SavedCheckpoint | None = None
    checkpoints: tuple[SavedCheckpoint, ...] = ()
    created_at: str | None = None
    base_model: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None
    can_resume: bool = False

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.path.name

    @property
    def size_bytes(self) -> int:
        """Of all its checkpoints."""
        return sum(checkpoint.size_bytes for checkpoint in self.checkpoints)


def list_runs(runs_folder: Path) -> list[RunSummary]:
    """Return the runs in a folder, the newest first. A folder that is not there has none.

    A run that says it is running while no process trains it is `interrupted`.
    """
    if not runs_folder.is_dir():
        return []
    found = [path for path in runs_folder.iterdir() if (path / MANIFEST).is_file()]
    runs = [read_run(path) for path in found]
    return sorted(runs, key=lambda run: (run.created_at or "", run.name), reverse=True)


def read_run(run_dir: Path) -> RunSummary:
    """Return one run as its files tell it."""
    try:
        manifest = read_manifest(run_dir)
        saved = tuple(
            _saved(run_dir, entry)
            for entry in manifest.get("checkpoints", [])
            if (run_dir / entry["name"]).is_file()
        )
    except (TrainingError, KeyError, TypeError) as error:
        return RunSummary(run_dir, "", DAMAGED, error=f"{run_dir / MANIFEST}: {error!s}")
    status = manifest.get("status", DAMAGED)
    if status == RUNNING and not is_training(run_dir, manifest):
        status = INTERRUPTED
    last = _last_step_line(run_dir / METRICS)
    step = max([int(last.get("step", 0)), *(checkpoint.step for checkpoint in saved)])
    total_steps = manifest.get("total_steps")
    resumable = [checkpoint for checkpoint in saved if checkpoint.can_resume]
    return RunSummary(
        path=run_dir,
        kind=manifest.get("kind", ""),
        status=status,
        step=step,
        total_steps=total_steps,
        last_loss=last.get("loss"),
        best=next((c for c in saved if c.path.name == manifest.get("best")), None),
        checkpoints=saved,
        created_at=manifest.get("created_at"),
        base_model=manifest.get("base_model"),
        settings=manifest.get("training", {}),
        error=manifest.get("error"),
        can_resume=status != RUNNING
        and bool(resumable)
        and (total_steps is None or resumable[-1].step < total_steps),
    )


def _saved(run_dir: Path, entry: Mapping[str, Any]) -> SavedCheckpoint:
    path = run_dir / entry["name"]
    parts = (path, path.with_suffix(".json"), state_path(path))
    return SavedCheckpoint(
        path=path,
        step=int(entry["step"]),
        by_epoch=bool(entry["by_epoch"]),
        validation_loss=entry.get("validation_loss"),
        size_bytes=sum(part.stat().st_size for part in parts if part.is_file()),
        can_resume=state_path(path).is_file(),
    )


def _last_step_line(path: Path) -> dict[str, Any]:
    """Return the newest line of a step in a metrics log, without reading all of the log."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - _TAIL_BYTES))
            lines = stream.read().splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except ValueError:
            continue  # Cut short by a crash, or by where the reading began.
        if isinstance(values, dict) and values.get("event") == "step":
            return values
    return {}
