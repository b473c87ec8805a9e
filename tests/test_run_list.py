"""What is on disk: runs listed truly, curves read as they grow, thinned without losing peaks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from csm_studio.jobs.curves import MetricsReader, read_metrics, thin
from csm_studio.jobs.state import RunningMean
from csm_studio.jobs.store import list_runs


def step_line(step: int, loss: float) -> str:
    line = {
        "event": "step",
        "step": step,
        "loss": loss,
        "learning_rate": 1e-3 / step,
        "grad_norm": 2.0,
        "frames_per_s": 100.0,
        "peak_memory_bytes": 1 << 30,
    }
    return json.dumps(line) + "\n"


def validation_line(step: int, loss: float) -> str:
    return json.dumps({"event": "validation", "step": step, "loss": loss}) + "\n"


def write_run(root: Path, name: str, **changes: Any) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    entries = []
    for step, loss in ((4, 2.0), (8, 3.0)):
        weights = f"lora_ckpt_step_{step}.safetensors"
        for suffix, size in ((".safetensors", 100), (".json", 10), (".state.safetensors", 200)):
            (folder / weights).with_suffix(suffix).write_bytes(b"0" * size)
        entries.append({"name": weights, "step": step, "by_epoch": False, "validation_loss": loss})
    manifest = {
        "kind": "lora",
        "status": "finished",
        "error": None,
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "checkpoints": entries,
        "best": "lora_ckpt_step_4.safetensors",
        "created_at": "2025-01-01T00:00:00+00:00",
        "total_steps": 20,
        "base_model": "demo",
        "training": {"batch_size": 2},
    }
    (folder / "run.json").write_text(json.dumps({**manifest, **changes}))
    (folder / "metrics.jsonl").write_text(step_line(8, 2.5) + step_line(9, 2.25) + '{"event": "st')
    return folder


def test_run_is_summed_up(tmp_path: Path) -> None:
    write_run(tmp_path, "voice", status="stopped")
    (tmp_path / "no_run").mkdir()
    (run,) = list_runs(tmp_path)
    assert (run.name, run.kind, run.status) == ("voice", "lora", "stopped")
    assert (run.step, run.total_steps, run.last_loss) == (9, 20, 2.25)
    assert [checkpoint.size_bytes for checkpoint in run.checkpoints] == [310, 310]
    assert run.size_bytes == 620
    assert run.best is run.checkpoints[0]
    assert run.settings == {"batch_size": 2}
    assert run.can_resume
    assert list_runs(tmp_path / "nowhere") == []


def test_running_is_believed_only_of_a_live_process(tmp_path: Path) -> None:
    parent = psutil.Process(os.getppid())
    alive = {"pid": parent.pid, "process_started": parent.create_time(), "status": "running"}
    write_run(tmp_path, "alive", **alive)
    write_run(tmp_path, "reused", **{**alive, "process_started": parent.create_time() - 1000})
    # This process wrote it and lives, but trains nothing.
    write_run(tmp_path, "left", status="running")
    runs = {run.name: run for run in list_runs(tmp_path)}
    assert runs["alive"].status == "running"
    assert runs["reused"].status == runs["left"].status == "interrupted"
    assert not runs["alive"].can_resume
    assert runs["left"].can_resume


def test_newest_comes_first_and_damage_is_told(tmp_path: Path) -> None:
    write_run(tmp_path, "old")
    write_run(tmp_path, "new", created_at="2025-02-01T00:00:00+00:00")
    (write_run(tmp_path, "torn") / "run.json").write_text('{"kind": ')
    runs = list_runs(tmp_path)
    assert [run.name for run in runs] == ["new", "old", "torn"]
    assert runs[2].status == "damaged"
    assert "torn" in str(runs[2].error)


@pytest.mark.parametrize("suffix", [".safetensors", ".state.safetensors"])
def test_without_its_files_a_run_cannot_be_resumed(tmp_path: Path, suffix: str) -> None:
    folder = write_run(tmp_path, "voice", status="stopped")
    for step in (4, 8):
        (folder / f"lora_ckpt_step_{step}{suffix}").unlink()
    assert not list_runs(tmp_path)[0].can_resume


def test_run_with_no_steps_left_cannot_be_resumed(tmp_path: Path) -> None:
    write_run(tmp_path, "voice", total_steps=8)
    assert not list_runs(tmp_path)[0].can_resume


def test_curves_of_a_growing_log(tmp_path: Path) -> None:
    log, reader = tmp_path / "metrics.jsonl", MetricsReader()
    assert reader.read(tmp_path).loss.step.size == 0
    log.write_text(validation_line(0, 5.0) + step_line(1, 4.0) + step_line(2, 3.0)[:20])
    curves = reader.read(tmp_path)
    assert curves.loss.step.tolist() == [1]
    assert curves.validation_loss.value.tolist() == [5.0]
    text = validation_line(0, 5.0) + "".join(step_line(step, 5 / step) for step in range(1, 50))
    log.write_text(text[: len(text) // 2])
    reader.read(tmp_path)
    with log.open("a") as stream:
        stream.write(text[len(text) // 2 :])
    grown, whole = reader.read(tmp_path), read_metrics(tmp_path)
    assert whole.last_step == 49
    for name in ("loss", "smoothed_loss", "validation_loss", "learning_rate", "peak_memory_bytes"):
        np.testing.assert_array_equal(getattr(grown, name).step, getattr(whole, name).step)
        np.testing.assert_array_equal(getattr(grown, name).value, getattr(whole, name).value)


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, reader = tmp_path / "metrics.jsonl", MetricsReader()
    log.write_text("".join(step_line(step, 1.0) for step in range(1, 400)))
    reader.read(tmp_path)
    parsed: list[Any] = []
    loads = json.loads

    def counted(text: bytes) -> Any:
        parsed.append(text)
        return loads(text)

    monkeypatch.setattr(json, "loads", counted)
    with log.open("a") as stream:
        stream.write(step_line(400, 2.0))
    assert reader.read(tmp_path).last_step == 400
    assert len(parsed) == 1


def test_log_cut_back_by_a_resume_is_read_anew(tmp_path: Path) -> None:
    log, reader = tmp_path / "metrics.jsonl", MetricsReader()
    lines = [step_line(step, 1.0) for step in range(1, 11)]
    log.write_text("".join(lines))
    reader.read(tmp_path)
    # As long as before, with other lines from step 6 on.
    log.write_text("".join(lines[:5] + [step_line(step, 2.0) for step in range(6, 11)]))
    assert reader.read(tmp_path).loss.value.tolist() == [1.0] * 5 + [2.0] * 5
    log.write_text("".join(lines[:3]))
    assert reader.read(tmp_path).last_step == 3


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(step_line(1, 1.0) + '{"a\n[]\n{}\n' + step_line(2, 2.0))
    assert read_metrics(tmp_path).loss.step.tolist() == [1, 2]


@pytest.mark.parametrize("num_points", [10, 11, 1000, 99_999])
def test_thinning_keeps_ends_and_extremes(num_points: int) -> None:
    value = np.random.default_rng(num_points).normal(size=num_points)
    low, high = num_points // 3, num_points // 2
    value[[low, high]] = -100, 100
    curve = thin(np.arange(num_points), value, 10)
    assert curve.step.size <= 10
    assert {0, low, high, num_points - 1} <= set(curve.step.tolist())
    assert (np.diff(curve.step) > 0).all()
    np.testing.assert_array_equal(curve.value, value[curve.step])


def test_few_points_are_kept_as_they_are() -> None:
    step, value = np.arange(9), np.array([1.0, np.nan, *range(7)])
    assert thin(step, value, 10).value.size == 9
    assert thin(step, value, 4).step.size <= 4


def test_running_mean_is_the_same_however_often_it_is_told() -> None:
    often, rarely = RunningMean(1.0), RunningMean(1.0)
    for _ in range(10):
        often.add(3.0)
    assert rarely.add(3.0, 10) == pytest.approx(often.value)
    assert RunningMean().add(4.0) == 4.0
