"""The folder of a training run: manifest, metrics log and checkpoints, written atomically.

run.json                          settings, base model, status, checkpoints (written last)
metrics.jsonl                     one event per line, for plots
lora_ckpt_epoch_N.safetensors     adapter (`ckpt_epoch_N` for full finetuning), also `_step_N`
lora_ckpt_epoch_N.json            the same description as in the file's header
lora_ckpt_epoch_N.state.safetensors   optimizer and position, to resume from
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from csm_studio.checkpoints.weights import (
    METADATA_KEY,
    read_description,
    read_weights,
    save_weights,
)
from csm_studio.errors import TrainingError, WeightsError
from csm_studio.files import atomic_path, write_json
from csm_studio.locks import process_is_alive, process_started

MANIFEST = "run.json"
METRICS = "metrics.jsonl"
_STATE_SUFFIX = ".state.safetensors"
# The folders that this process trains in now: its number alone does not tell, since it lives on
# after a run.
_claimed: set[Path] = set()


@dataclasses.dataclass
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        name: File name within the run's folder.
        step: Optimizer steps taken.
        by_epoch: Saved at the end of an epoch, or between.
        validation_loss: None where nothing is held out.
    """

    name: str
    step: int
    by_epoch: bool
    validation_loss: float | None = None


class RunDir:
    """One run's folder, claimed by one process at a time.

    Args:
        root: The folder; it need not exist.
        kind: `lora` or `full`.
        keep_last: Epoch and step checkpoints to keep, each; 0 keeps all.
    """

    def __init__(self, root: Path, kind: str, keep_last: int = 0) -> None:
        self.root = root
        self.kind = kind
        self._keep_last = keep_last
        self._manifest: dict[str, Any] = {}
        self.checkpoints: list[Checkpoint] = []

    @property
    def best(self) -> Checkpoint | None:
        """The checkpoint with the lowest validation loss, or None without validation."""
        scored = [c for c in self.checkpoints if c.validation_loss is not None]
        return min(scored, key=lambda c: (c.validation_loss, c.step)) if scored else None

    def claim(self, description: Mapping[str, Any], resume: ResumePoint | None) -> None:
        """Take the folder for this process and write the manifest.

        Args:
            description: Settings and base model, kept in the manifest.
            resume: Where the run goes on, or None for a new one.

        Raises:
            TrainingError: A live process trains here, or the folder holds another run.
        """
        self.refuse_if_taken(resume)
        now = datetime.datetime.now(datetime.timezone.utc)
        created_at = now.isoformat(timespec="milliseconds")
        if resume is not None and self._holds(resume):
            previous = read_manifest(self.root)
            created_at = previous.get("created_at", created_at)
            self.checkpoints = [
                Checkpoint(**entry)
                for entry in previous.get("checkpoints", [])
                if entry["step"] <= resume.step and (self.root / entry["name"]).exists()
            ]
            self._trim_metrics(resume.step)
        self._manifest = {**description, "created_at": created_at}
        _claimed.add(self.root.resolve())
        try:
            self.mark("running")
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the folder back."""
        _claimed.discard(self.root.resolve())

    def refuse_if_taken(self, resume: ResumePoint | None) -> None:
        """Raise `TrainingError` if a process trains here, or the folder holds another run.

        Called before slow preparations, and again by `claim`.
        """
        previous = read_manifest(self.root)
        if is_training(self.root, previous):
            raise TrainingError(
                f"{self.root}: process {previous['pid']} is training here. Choose another "
                "--output-dir, or stop that run first."
            )
        if previous and not self._holds(resume):
            raise TrainingError(
                f"{self.root}: holds a run already ({previous.get('status')}). Choose another "
                f"--output-dir, or go on with it by --resume-from {self.root}"
            )
        if self.root.exists() and not self.root.is_dir():
            raise TrainingError(f"{self.root}: is a file. Choose another --output-dir.")

    def _holds(self, resume: ResumePoint | None) -> bool:
        return resume is not None and resume.checkpoint.parent.resolve() == self.root.resolve()

    def mark(self, status: str, error: str | None = None) -> None:
        """Write the manifest with a new status."""
        best = self.best
        write_json(
            self.root / MANIFEST,
            {
                **self._manifest,
                "status": status,
                "error": error,
                "pid": os.getpid(),
                "process_started": process_started(),
                "checkpoints": [dataclasses.asdict(c) for c in self.checkpoints],
                "best": best.name if best else None,
            },
        )

    def log(self, event: Mapping[str, Any]) -> None:
        """Append one event to the metrics log."""
        with (self.root / METRICS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(event) + "\n")

    def save(
        self,
        checkpoint: Checkpoint,
        weights: Mapping[str, mx.array],
        description: Mapping[str, Any],
        state: Mapping[str, mx.array],
    ) -> Path:
        """Write a checkpoint and drop those no longer kept.

        Args:
            checkpoint: Its name and place; the name ends in `.safetensors`.
            weights: What is loaded to use it.
            description: What both files say of themselves, also written beside them.
            state: Optimizer arrays, to resume from.

        Returns:
            The path of the weights.
        """
        path = self.root / checkpoint.name
        save_weights(state_path(path), state, description)
        write_json(path.with_suffix(".json"), {METADATA_KEY: description})
        save_weights(path, weights, description)
        self.checkpoints = [c for c in self.checkpoints if c.name != checkpoint.name]
        self.checkpoints.append(checkpoint)
        self._prune()
        self.mark("running")
        return path

    def _prune(self) -> None:
        kept = {self.checkpoints[-1].name}
        if (best := self.best) is not None:
            kept.add(best.name)
        for by_epoch in (True, False):
            alike = [c.name for c in self.checkpoints if c.by_epoch == by_epoch]
            kept.update(alike[-self._keep_last :] if self._keep_last else alike)
        for checkpoint in self.checkpoints:
            path = self.root / checkpoint.name
            if checkpoint.name not in kept:
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)
            # The state of a full run is twice the model's size: only the newest can be resumed.
            newest = checkpoint is self.checkpoints[-1]
            if checkpoint.name not in kept or (self.kind == "full" and not newest):
                state_path(path).unlink(missing_ok=True)
        self.checkpoints = [c for c in self.checkpoints if c.name in kept]

    def _trim_metrics(self, step: int) -> None:
        """Drop lines past the step that the run goes on from."""
        path = self.root / METRICS
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue  # A line cut short by a crash.
        with atomic_path(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from.

    Attributes:
        checkpoint: Path of its weights.
        step: Optimizer steps taken.
        description: What the checkpoint says of its run.
        optimizer: Optimizer arrays by dotted name.
    """

    checkpoint: Path
    step: int
    description: dict[str, Any]
    optimizer: dict[str, mx.array]


def find_resume_point(path: Path) -> ResumePoint:
    """Read the newest checkpoint of a run's folder, or the one named.

    Args:
        path: A run's folder or a checkpoint's weights.

    Raises:
        TrainingError: There is nothing to go on from.
    """
    path = path.expanduser()
    if path.is_dir():
        listed = [path / entry["name"] for entry in read_manifest(path).get("checkpoints", [])]
        complete = [name for name in listed if name.exists() and state_path(name).exists()]
        if not complete:
            raise TrainingError(f"{path}: no checkpoint to resume from. Start a new run.")
        path = complete[-1]
    if not path.exists():
        raise TrainingError(f"{path}: not found. Name a checkpoint or a run's folder.")
    state = state_path(path)
    if not state.exists():
        raise TrainingError(
            f"{path}: {state.name} is not beside it, so the optimizer's state is lost and the run "
            f"cannot go on exactly. Resume from the newest checkpoint of the run "
            f"(--resume-from {path.parent}), or start a new run from these weights."
        )
    try:
        description = read_description(state)
        arrays = read_weights(state)
        mx.eval(arrays)
        return ResumePoint(path, int(description["step"]), description, arrays)
    except (WeightsError, KeyError, ValueError) as error:
        raise TrainingError(f"{state}: damaged ({error}). Resume from another one.") from error


def state_path(checkpoint: Path) -> Path:
    """Return where the optimizer's state of a checkpoint lies."""
    return checkpoint.with_name(checkpoint.stem + _STATE_SUFFIX)


def read_manifest(root: Path) -> dict[str, Any]:
    """Return what a run's folder says of the run; empty where there is none.

    Raises:
        TrainingError: The file is damaged.
    """
    path = root / MANIFEST
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise TrainingError(f"{path}: damaged ({error}). Choose another --output-dir.") from error


def is_training(root: Path, manifest: Mapping[str, Any]) -> bool:
    """Tell whether a live process trains in a folder, by its manifest.

    A run whose manifest says `running` and that nobody trains was interrupted.
    """
    if manifest.get("status") != "running":
        return False
    if manifest.get("pid") == os.getpid():
        return root.resolve() in _claimed
    return process_is_alive(manifest.get("pid"), manifest.get("process_started"))
