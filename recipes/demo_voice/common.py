"""What every training stage shares: atomic checkpoints, schedules, devices, logs."""

import json
import math
import os
import time
from pathlib import Path

import torch


def pick_device() -> torch.device:
    """Return CUDA where there is a device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Return a bfloat16 autocast context for the device."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint so that a crash leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path, device: torch.device) -> dict | None:
    """Return a checkpoint of this recipe, or None where there is none yet."""
    if not path.exists():
        return None
    return torch.load(path, map_location=device, weights_only=False)


class Budget:
    """Progress of a run limited by steps or by minutes, whichever comes first.

    Time is counted over all sessions of a resumed run, so a schedule in `progress` continues
    where it stopped.
    """

    def __init__(self, max_steps: int, max_minutes: float, elapsed_s: float = 0.0) -> None:
        self.max_steps = max_steps
        self.max_seconds = max_minutes * 60.0
        self._before_s = elapsed_s
        self._began = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds trained so far, earlier sessions included."""
        return self._before_s + time.monotonic() - self._began

    def progress(self, step: int) -> float:
        """Return how much of the budget is used, 0 to 1."""
        return min(1.0, max(step / self.max_steps, self.elapsed_s / self.max_seconds))


def learning_rate(
    peak: float, step: int, progress: float, warmup_steps: int, floor: float
) -> float:
    """Linear warm-up, then cosine decay from `peak` to `peak * floor` over `progress` 0 to 1."""
    warmup = min(1.0, (step + 1) / warmup_steps)
    return peak * warmup * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))


class TrainingLog:
    """Appends measurements to a JSON-lines file and prints them."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def write(self, **values: float | int | str | list) -> None:
        """Append one line; floats are rounded to four decimals."""
        row = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(row, flush=True)


def read_log(path: Path) -> list[dict]:
    """Return the rows of a training log, none where there is no such file.

    A run that is stopped goes on from its last checkpoint and repeats some steps: of two rows of
    one step the later counts.
    """
    if not path.exists():
        return []
    rows: dict[tuple, dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        key = (row["step"], any(name.startswith("held_out") for name in row))
        rows.pop(key, None)
        rows[key] = row
    return list(rows.values())
