"""Background trainings: steered from outside, spoken over, stopped, killed, resumed, failed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csm_studio.audio.io import write_wav
from csm_studio.configs import CSMConfig, MimiConfig
from csm_studio.errors import JobError, LossNotFiniteError, OptionError, TrainingError
from csm_studio.generation.generator import generate_speech
from csm_studio.generation.streaming import stream_generate
from csm_studio.jobs.advice import Advice, advise, is_disk_full, is_out_of_memory
from csm_studio.jobs.curves import read_metrics
from csm_studio.jobs.store import list_runs
from csm_studio.jobs.training import TrainingJob, TrainingRunner
from csm_studio.jobs.worker import Worker
from csm_studio.model_folder import load_model, save_model_folder
from csm_studio.training.config import FullOptions, LoRAOptions, options_from_manifest
from csm_studio.training.events import StepDone
from csm_studio.training.run_dir import read_manifest, state_path
from csm_studio.training.trainer import Trainer
from tests.conftest import load_arrays
from tests.tiny_voice import make_voice

ROOT = Path(__file__).parents[1]
WAIT_S = 60.0
NUM_STEPS = 12


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close(WAIT_S)


@pytest.fixture
def runner(worker: Worker) -> TrainingRunner:
    return TrainingRunner(worker)


@pytest.fixture
def workplace(tiny_csm_config: CSMConfig, tiny_mimi_config: MimiConfig, tmp_path: Path) -> Path:
    """A folder with a tiny voice and a dataset of eight clips of noise."""
    save_model_folder(make_voice(tiny_csm_config, tiny_mimi_config), tmp_path / "voice", "Tiny")
    rng = np.random.default_rng(0)
    entries = []
    for index in range(8):
        samples = rng.normal(0, 0.1, 4_000 + 1_000 * index).astype(np.float32)
        write_wav(tmp_path / f"clip{index}.wav", samples)
        entries.append({"text": f"Clip {index}.", "audio_path": f"clip{index}.wav", "speaker": 0})
    (tmp_path / "dataset.json").write_text(json.dumps(entries))
    return tmp_path


def options(workplace: Path, name: str, **changes: Any) -> LoRAOptions:
    """Settings of a run of twelve steps."""
    settings: dict[str, Any] = {
        "data_path": workplace / "dataset.json",
        "output_dir": workplace / "runs" / name,
        "model": str(workplace / "voice"),
        "cache_dir": workplace / "cache",
        "batch_size": 2,
        "epochs": 3,
        "learning_rate": 1e-2,
        "depth_frame_ratio": 0.5,
        "val_split": 0.1,
        "save_every": 0,
        "log_every": 1,
    }
    return LoRAOptions(**{**settings, **changes})


class Gate:
    """Holds a training after each of its steps, before it looks at what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int = 1) -> None:
        self._reached = threading.Semaphore(0)
        self._go = threading.Semaphore(0)
        self._first = first
        self._is_open = False
        on_event = TrainingJob._on_event

        def held(job: TrainingJob, event: Any) -> None:
            is_step = isinstance(event, StepDone) and event.step >= self._first
            if is_step and not self._is_open:
                self._reached.release()
                assert self._go.acquire(timeout=WAIT_S)
            on_event(job, event)

        monkeypatch.setattr(TrainingJob, "_on_event", held)

    def wait(self) -> None:
        """Wait for the next step's end."""
        assert self._reached.acquire(timeout=WAIT_S)

    def open(self) -> None:
        """Hold no more."""
        self._is_open = True
        self._go.release()


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in load_arrays(path).items()}


def assert_same_run(one: Path, other: Path) -> None:
    """Compare weights, optimizer and losses of two runs, to the bit."""
    name = "lora_ckpt_epoch_3.safetensors"
    for ours, theirs in ((one / name, other / name), map(state_path, (one / name, other / name))):
        expected = tensors(theirs)
        found = tensors(ours)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)
    curves = [read_metrics(run).loss for run in (one, other)]
    np.testing.assert_array_equal(curves[0].step, curves[1].step)
    np.testing.assert_array_equal(curves[0].value, curves[1].value)


def finish(job: TrainingJob) -> Path:
    state = job.wait(WAIT_S)
    assert state.phase == "finished", state.error
    return state.run_dir


def test_state_follows_the_run(workplace: Path, runner: TrainingRunner) -> None:
    before = time.time()
    job = runner.start(options(workplace, "voice"))
    assert runner.job is job
    run_dir = finish(job)
    state = job.state
    assert (state.name, state.kind, state.is_over) == ("voice", "lora", True)
    assert (state.step, state.total_steps, state.epoch) == (NUM_STEPS, NUM_STEPS, 3)
    assert (state.num_encoded, state.num_clips) == (8, 8)
    assert before <= state.started_at <= time.time()
    assert [path.name for path in state.checkpoints] == [
        f"lora_ckpt_epoch_{epoch}.safetensors" for epoch in (1, 2, 3)
    ]
    assert state.best in state.checkpoints
    for value in (state.loss, state.smoothed_loss, state.validation_loss, state.learning_rate):
        assert value is not None
        assert np.isfinite(value)
    assert state.frames_per_s
    assert state.peak_memory_bytes
    assert any("validation loss" in line for line in state.log)
    (run,) = list_runs(workplace / "runs")
    assert (run.status, run.step, run.total_steps) == ("finished", NUM_STEPS, NUM_STEPS)
    assert run.last_loss == state.loss
    assert state.best == (run.best.path if run.best else None)
    smoothed = read_metrics(run_dir).smoothed_loss.value[-1]
    assert smoothed == pytest.approx(state.smoothed_loss)


def test_phases_come_in_order(
    workplace: Path, runner: TrainingRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    update = TrainingJob._update

    def noted(job: TrainingJob, line: str = "", **changes: Any) -> None:
        update(job, line, **changes)
        seen.append(job.state.phase_text)

    monkeypatch.setattr(TrainingJob, "_update", noted)
    finish(runner.start(options(workplace, "voice", epochs=1)))
    once = list(dict.fromkeys(seen))
    assert once[:2] == ["loading the model", "encoding audio"]
    assert once[2] == "encoding audio 0 of 8"
    assert "encoding audio 8 of 8" in once
    assert once[-1] == "training"


def test_speech_asked_for_in_training_comes_before_its_end_and_changes_nothing(
    workplace: Path, runner: TrainingRunner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = finish(runner.start(options(workplace, "alone")))
    gate = Gate(monkeypatch, first=5)
    job = runner.start(options(workplace, "spoken_over"))
    gate.wait()

    def speak() -> np.ndarray:
        voice = load_model(str(workplace / "voice"))
        return generate_speech(voice, "Hi.", 0, max_audio_length_ms=800, seed=1).audio

    def stream() -> Iterator[np.ndarray]:
        voice = load_model(str(workplace / "voice"))
        yield from stream_generate(voice, "Hi.", 0, max_audio_length_ms=800, seed=1)

    whole = worker.submit(speak, label="speech", urgent=True)
    chunks = worker.stream(stream, label="speech")
    steps: list[int] = []
    whole.add_done_callback(lambda _: steps.append(job.state.step))
    gate.open()
    audio = whole.result(WAIT_S)
    assert steps == [5]
    np.testing.assert_allclose(np.concatenate(list(chunks)), audio, atol=1e-5)
    assert_same_run(finish(job), alone)


def test_save_in_between_changes_nothing(
    workplace: Path, runner: TrainingRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = finish(runner.start(options(workplace, "plain")))
    gate = Gate(monkeypatch, first=5)
    job = runner.start(options(workplace, "saved"))
    gate.wait()
    job.save_now()
    assert job.state.is_save_wanted
    gate.open()
    saved = finish(job)
    assert not job.state.is_save_wanted
    names = [path.name for path in job.state.checkpoints]
    # Asked for once, saved once.
    assert names.count("lora_ckpt_step_5.safetensors") == 1
    assert len(names) == 4
    assert_same_run(saved, plain)


def test_stopped_and_resumed_equals_uninterrupted(
    workplace: Path, runner: TrainingRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finish(runner.start(options(workplace, "whole")))
    gate = Gate(monkeypatch, first=5)
    job = runner.start(options(workplace, "parts"))
    gate.wait()
    job.stop()
    assert job.state.is_stopping
    gate.open()
    state = job.wait(WAIT_S)
    assert (state.phase, state.step) == ("stopped", 5)
    assert list_runs(workplace / "runs")[0].can_resume
    resumed = runner.resume(state.run_dir)
    assert_same_run(finish(resumed), whole)
    assert resumed.state.smoothed_loss == pytest.approx(read_metrics(whole).smoothed_loss.value[-1])


def test_one_training_at_a_time(
    workplace: Path, runner: TrainingRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    job = runner.start(options(workplace, "first"))
    gate.wait()
    with pytest.raises(JobError, match=r"running already \(first"):
        runner.start(options(workplace, "second"))
    with pytest.raises(JobError, match="being trained already"):
        runner.resume(workplace / "runs/first")
    assert [run.status for run in list_runs(workplace / "runs")] == ["running"]
    job.stop()
    gate.open()
    assert job.wait(WAIT_S).phase == "stopped"
    finish(runner.start(options(workplace, "second", epochs=1)))


def test_wrong_starts_are_refused_at_once(workplace: Path, runner: TrainingRunner) -> None:
    with pytest.raises(OptionError, match="--batch-size"):
        runner.start(options(workplace, "voice", batch_size=0))
    with pytest.raises(JobError, match="holds no run"):
        runner.resume(workplace / "runs/voice")
    run_dir = finish(runner.start(options(workplace, "voice", epochs=1)))
    with pytest.raises(TrainingError, match="holds a run already"):
        runner.start(options(workplace, "voice"))
    with pytest.raises(JobError, match="sped: no setting of a lora training"):
        runner.resume(run_dir, {"sped": 2})
    resumed = runner.resume(run_dir, {"epochs": 2})
    assert finish(resumed) == run_dir
    assert resumed.state.step == 8


def test_stop_before_it_began_leaves_nothing(
    workplace: Path, runner: TrainingRunner, worker: Worker
) -> None:
    gate = threading.Event()
    worker.submit(lambda: gate.wait(WAIT_S))
    job = runner.start(options(workplace, "voice"))
    job.stop()
    assert job.state.phase == "stopped"
    gate.set()
    finish(runner.start(options(workplace, "voice", epochs=1)))


def test_stop_while_loading_leaves_nothing(
    workplace: Path, runner: TrainingRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate = threading.Event(), threading.Event()

    def held(*arguments: Any, **more: Any) -> Any:
        begun.set()
        assert gate.wait(WAIT_S)
        return load_model(*arguments, **more)

    monkeypatch.setattr("csm_studio.training.course.load_model", held)
    job = runner.start(options(workplace, "voice"))
    assert begun.wait(WAIT_S)
    job.stop()
    gate.set()
    assert job.wait(WAIT_S).phase == "stopped"
    assert not (workplace / "runs").exists()


def test_closing_the_worker_stops_with_a_checkpoint(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker()
    gate = Gate(monkeypatch, first=3)
    job = TrainingRunner(worker).start(options(workplace, "voice"))
    gate.wait()
    closing = threading.Thread(target=worker.close, args=(WAIT_S,))
    closing.start()
    while not worker.is_closing:
        time.sleep(0.001)
    gate.open()
    closing.join(WAIT_S)
    assert (job.state.phase, job.state.step) == ("stopped", 3)
    (run,) = list_runs(workplace / "runs")
    assert (run.status, run.can_resume) == ("stopped", True)


_KILLED = """
import json, sys, time
from csm_studio.jobs.training import TrainingJob, TrainingRunner
from csm_studio.jobs.worker import Worker
from csm_studio.training.config import options_from_manifest
on_event = TrainingJob._on_event
def held(job, event):
    on_event(job, event)
    if type(event).__name__ == "StepDone" and event.step == 6:
        print("reached", flush=True)
        time.sleep(60)
TrainingJob._on_event = held
TrainingRunner(Worker()).start(options_from_manifest(json.loads(sys.argv[1]))).wait()
"""


def test_killed_run_is_interrupted_and_resumes_to_the_same_result(
    workplace: Path, runner: TrainingRunner
) -> None:
    whole = finish(runner.start(options(workplace, "whole", save_every=5)))
    chosen = dataclasses.asdict(options(workplace, "killed", save_every=5))
    plain = {key: str(v) if isinstance(v, Path) else v for key, v in chosen.items()}
    killed = subprocess.Popen(
        [sys.executable, "-c", _KILLED, json.dumps({"kind": "lora", "training": plain})],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ,
    )
    assert killed.stdout is not None
    assert killed.stdout.readline() == "reached\n"
    statuses = {run.name: run.status for run in list_runs(workplace / "runs")}
    assert statuses == {"whole": "finished", "killed": "running"}
    with pytest.raises(JobError, match="being trained already"):
        runner.resume(workplace / "runs/killed")
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=WAIT_S)
    run = next(run for run in list_runs(workplace / "runs") if run.name == "killed")
    assert (run.status, run.step, run.can_resume) == ("interrupted", 5, True)
    assert_same_run(finish(runner.resume(run.path)), whole)


def test_failures_are_told_in_plain_words(workplace: Path, runner: TrainingRunner) -> None:
    missing = runner.start(options(workplace, "missing", data_path=workplace / "gone.json"))
    state = missing.wait(WAIT_S)
    assert state.phase == "failed"
    assert state.error is not None
    assert "gone.json" in state.error
    assert state.traceback is None
    assert state.advice is None

    job = runner.start(
        options(workplace, "infinite", optimizer="sgd", learning_rate=1e30, max_grad_norm=0.0)
    )
    state = job.wait(WAIT_S)
    assert state.phase == "failed"
    assert "not finite" in str(state.error)
    assert state.advice is not None
    assert state.advice.changes == {
        "learning_rate": 2e29,
        "max_grad_norm": 1.0,
        "warmup_steps": 20,
    }
    assert list_runs(workplace / "runs")[0].status == "failed"
    mended = dataclasses.replace(
        options(workplace, "mended", epochs=1), **{**state.advice.changes, "learning_rate": 1e-3}
    )
    finish(runner.start(mended))


def test_defect_keeps_its_traceback_and_memory_is_advised(
    workplace: Path, runner: TrainingRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(error: Exception) -> Callable[..., Any]:
        def step(*_: Any) -> Any:
            raise error

        return step

    monkeypatch.setattr(Trainer, "_step", broken(KeyError("x")))
    state = runner.start(options(workplace, "defect")).wait(WAIT_S)
    assert state.error == "KeyError: 'x'"
    assert "in step" in str(state.traceback)
    monkeypatch.setattr(Trainer, "_step", broken(RuntimeError("[malloc] Unable to allocate 9 B.")))
    state = runner.start(options(workplace, "memory")).wait(WAIT_S)
    assert str(state.error).startswith("Memory ran out")
    assert state.traceback is None
    assert state.advice is not None
    assert state.advice.changes == {"batch_size": 1, "grad_accumulation_steps": 2}
    assert not state.advice.resumes


def test_a_full_disk_fails_without_hiding_why(
    workplace: Path, runner: TrainingRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("csm_studio.training.run_dir.save_weights", full)
    train = Trainer._loop

    def loop(trainer: Trainer, first_step: int) -> Any:
        monkeypatch.setattr("csm_studio.training.run_dir.write_json", full)
        return train(trainer, first_step)

    monkeypatch.setattr(Trainer, "_loop", loop)
    state = runner.start(options(workplace, "voice")).wait(WAIT_S)
    assert state.phase == "failed"
    assert str(state.error).startswith("The disk is full")
    # The manifest could not be written: it still says running, and is not believed.
    assert list_runs(workplace / "runs")[0].status == "interrupted"


@pytest.mark.parametrize(
    ("changes", "has_checkpoint", "expected"),
    [
        ({}, False, {"batch_size": 2, "grad_accumulation_steps": 2}),
        ({}, True, {"gradient_checkpointing": True}),
        ({"batch_size": 1}, False, {"gradient_checkpointing": True}),
        (
            {"gradient_checkpointing": True, "batch_size": 3, "grad_accumulation_steps": 2},
            True,
            {"batch_size": 1, "grad_accumulation_steps": 4},
        ),
        (
            {"gradient_checkpointing": True, "batch_size": 1},
            False,
            {"max_audio_length_ms": 15_000},
        ),
    ],
)
def test_advice_for_memory(
    changes: dict[str, Any], has_checkpoint: bool, expected: dict[str, Any]
) -> None:
    settings = LoRAOptions(data_path=Path("d.json"), **changes)
    found = advise(RuntimeError("[malloc] Unable to allocate"), settings, has_checkpoint)
    assert found is not None
    assert found.changes == expected
    assert found.resumes == (has_checkpoint and expected.keys() == {"gradient_checkpointing"})


def test_advice_when_nothing_is_left_to_change() -> None:
    full = FullOptions(data_path=Path("d.json"), batch_size=1, gradient_checkpointing=True)
    found = advise(MemoryError(), full, True)
    assert found is not None
    assert "LoRA" in found.text
    assert not found.changes
    assert advise(TrainingError("taken"), full, True) is None
    assert isinstance(advise(LossNotFiniteError("x"), full, False), Advice)


def test_errors_are_told_apart() -> None:
    for words in (
        "[malloc] Unable to allocate 100 bytes.",
        "[METAL] Command buffer execution failed: Insufficient Memory (00000008:...)",
        "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum",
        "cudaMallocAsync failed: out of memory",
    ):
        assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(RuntimeError("[matmul] shapes differ"))
    assert not is_out_of_memory(KeyError("malloc"))
    assert is_disk_full(OSError(28, "No space left on device"))
    assert is_disk_full(RuntimeError("[write] Unable to write 3145822 bytes to file."))
    assert not is_disk_full(OSError(2, "No such file"))


def test_settings_survive_the_manifest(workplace: Path, runner: TrainingRunner) -> None:
    chosen = options(workplace, "voice", epochs=1, target_modules=["mlp"], mask_speaker_ids=[7])
    run_dir = finish(runner.start(chosen))
    assert options_from_manifest(read_manifest(run_dir)) == chosen
    manifest = read_manifest(run_dir)
    with pytest.raises(OptionError, match="does not know: speed"):
        options_from_manifest({**manifest, "training": {"speed": 1}})
    with pytest.raises(OptionError, match="missing"):
        options_from_manifest({"kind": "full"})


def test_moved_run_resumes_where_it_is_now(
    workplace: Path, runner: TrainingRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, first=2)
    job = runner.start(options(workplace, "voice"))
    gate.wait()
    job.stop()
    gate.open()
    job.wait(WAIT_S)
    moved = workplace / "elsewhere"
    shutil.move(workplace / "runs/voice", moved)
    shutil.move(workplace / "dataset.json", workplace / "moved.json")
    resumed = runner.resume(moved, {"data_path": workplace / "moved.json"})
    assert finish(resumed) == moved
    assert not (workplace / "runs/voice").exists()
