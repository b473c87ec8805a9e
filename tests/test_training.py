"""The trainer: learns, resumes to the bit, keeps and refuses folders, stops cleanly."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import psutil
import pytest

from csm_studio.checkpoints.weights import METADATA_KEY, flatten, read_description
from csm_studio.configs import CSMConfig
from csm_studio.dataset.batches import build_batch, epoch_batches
from csm_studio.errors import AdapterError, OptionError, TrainingError
from csm_studio.models.adapters import load_lora_weights
from csm_studio.models.csm import CSM
from csm_studio.training import events
from csm_studio.training.config import FullOptions, LoRAOptions
from csm_studio.training.prepare import TrainingData, prepare_model
from csm_studio.training.run_dir import find_resume_point, state_path
from csm_studio.training.trainer import Trainer
from tests.test_loss import random_examples

LENGTHS = [5, 9, 4, 12, 7, 6, 11, 8]


@pytest.fixture
def make_base(tiny_csm_config: CSMConfig) -> Callable[[], CSM]:
    """Return copies of one random model."""
    mx.random.seed(3)
    weights = list(flatten(CSM(tiny_csm_config).parameters()).items())
    return lambda: CSM(tiny_csm_config).load_weights(weights)


@pytest.fixture
def data(tiny_csm_config: CSMConfig) -> TrainingData:
    return TrainingData(
        train=tuple(random_examples(tiny_csm_config, LENGTHS)),
        validation=tuple(random_examples(tiny_csm_config, [6, 10, 3], seed=5)),
        notes=(),
        fingerprint="tiny",
    )


def lora_options(folder: Path, **changes: Any) -> LoRAOptions:
    """Settings of a short run that draws on everything random."""
    settings: dict[str, Any] = {
        "data_path": Path("dataset.json"),
        "output_dir": folder,
        "batch_size": 2,
        "epochs": 2,
        "learning_rate": 1e-2,
        "depth_frame_ratio": 0.3,
        "warmup_steps": 2,
        "lr_schedule": "cosine",
        "save_every": 0,
        "log_every": 1,
        "keep_last": 0,
    }
    return LoRAOptions(**{**settings, **changes})


def full_options(folder: Path, **changes: Any) -> FullOptions:
    return FullOptions(
        **{
            "data_path": Path("dataset.json"),
            "output_dir": folder,
            "batch_size": 2,
            "epochs": 2,
            "learning_rate": 1e-3,
            "save_every": 0,
            "log_every": 1,
            **changes,
        }
    )


def read_log(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in mx.load(str(path)).items()}


def assert_same_files(one: Path, other: Path) -> None:
    ours, theirs = arrays(one), arrays(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_loss_falls_and_checkpoints_describe_themselves(
    make_base: Callable[[], CSM], data: TrainingData, tmp_path: Path
) -> None:
    options = lora_options(
        tmp_path,
        epochs=6,
        depth_frame_ratio=1.0,
        target_modules=["attn", "mlp", "audio_head", "codebook0_head"],
    )
    seen: list[events.Event] = []
    ended = Trainer(prepare_model(make_base(), options), data, options, seen.append).run()
    losses = [line["loss"] for line in read_log(tmp_path, "step")]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.2
    assert ended.outcome == "finished"
    assert ended.checkpoint.name == "lora_ckpt_epoch_6.safetensors"
    kinds = [type(event) for event in seen]
    assert kinds[0] is events.RunStarted
    assert kinds[-1] is events.RunEnded
    assert kinds.count(events.StepDone) == 24
    described = read_description(ended.checkpoint)
    assert described == json.loads(ended.checkpoint.with_suffix(".json").read_text())[METADATA_KEY]
    assert described["rank"] == 8
    assert described["training"]["seed"] == 0
    manifest = json.loads((tmp_path / "run.json").read_text())
    assert manifest["status"] == "finished"
    loaded = load_lora_weights(make_base(), ended.checkpoint)
    assert loaded.adapter is not None


def test_validation_covers_every_held_out_example(
    make_base: Callable[[], CSM], data: TrainingData, tmp_path: Path
) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    for folder, size in ((one, 1), (three, 3)):
        options = lora_options(folder, batch_size=size, epochs=1)
        Trainer(prepare_model(make_base(), options), data, options).run()
    first = [read_log(folder, "validation")[0] for folder in (one, three)]
    # Before the first step both are the base model: batching must not matter.
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
    assert first[0]["step"] == 0


class StopAfter:
    """Asks for a stop once so many steps were reported."""

    def __init__(self, num_steps: int) -> None:
        self._left = num_steps

    def on_event(self, event: events.Event) -> None:
        self._left -= isinstance(event, events.StepDone)

    def __call__(self) -> bool:
        return self._left <= 0


@pytest.mark.parametrize("make_options", [lora_options, full_options])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stop_at", [3, 6])
def test_resume_is_bit_exact(
    make_base: Callable[[], CSM],
    data: TrainingData,
    tmp_path: Path,
    make_options: Callable[..., Any],
    optimizer: str,
    stop_at: int,
) -> None:
    whole = make_options(tmp_path / "whole", optimizer=optimizer, grad_accumulation_steps=1)
    ended = Trainer(prepare_model(make_base(), whole), data, whole).run()

    parts = make_options(tmp_path / "parts", optimizer=optimizer, grad_accumulation_steps=1)
    stop = StopAfter(stop_at)
    stopped = Trainer(prepare_model(make_base(), parts), data, parts, stop.on_event, stop).run()
    assert (stopped.outcome, stopped.step) == ("stopped", stop_at)
    assert json.loads((tmp_path / "parts/run.json").read_text())["status"] == "stopped"

    resume = find_resume_point(tmp_path / "parts")
    resumed = Trainer(prepare_model(make_base(), parts), data, parts, resume=resume).run()
    assert_same_files(ended.checkpoint, resumed.checkpoint)
    assert_same_files(state_path(ended.checkpoint), state_path(resumed.checkpoint))
    steps = [
        [(line["step"], line["loss"]) for line in read_log(tmp_path / part, "step")]
        for part in ("whole", "parts")
    ]
    assert steps[0] == steps[1]


def test_accumulated_batches_equal_one_large_batch(
    make_base: Callable[[], CSM], data: TrainingData, tmp_path: Path
) -> None:
    # One batch an epoch, so that both orders hold the same examples in a step.
    results = []
    for name, size, accumulate in (("large", 8, 1), ("small", 2, 4)):
        options = full_options(
            tmp_path / name,
            batch_size=size,
            grad_accumulation_steps=accumulate,
            depth_frame_ratio=1.0,
            optimizer="sgd",
            learning_rate=0.1,
        )
        results.append(Trainer(prepare_model(make_base(), options), data, options).run())
    large, small = (arrays(result.checkpoint) for result in results)
    for name, value in large.items():
        np.testing.assert_allclose(value, small[name], atol=3e-6, err_msg=name)


def test_gradients_are_clipped(
    make_base: Callable[[], CSM], data: TrainingData, tmp_path: Path
) -> None:
    moved = []
    for name, limit in (("free", 0.0), ("clipped", 1e-4)):
        options = full_options(
            tmp_path / name,
            epochs=1,
            optimizer="sgd",
            learning_rate=1.0,
            max_grad_norm=limit,
            weight_decay=0.0,
        )
        before = {name: np.array(v) for name, v in flatten(make_base().parameters()).items()}
        ended = Trainer(prepare_model(make_base(), options), data, options).run()
        after = arrays(ended.checkpoint)
        moved.append(np.sqrt(sum(((after[n] - before[n]) ** 2).sum() for n in before)))
    assert moved[1] <= 4 * 1e-4 * 1.01
    assert moved[0] > 100 * moved[1]


def test_old_checkpoints_go_and_the_best_stays(
    make_base: Callable[[], CSM], data: TrainingData, tmp_path: Path
) -> None:
    options = lora_options(tmp_path, epochs=4, save_every=1, keep_last=1, learning_rate=0.05)
    trainer = Trainer(prepare_model(make_base(), options), data, options)
    trainer.run()
    files = {path.name for path in tmp_path.glob("*.safetensors") if ".state." not in path.name}
    best = trainer.run_dir.best
    assert best is not None
    losses = {line["step"]: line["loss"] for line in read_log(tmp_path, "validation")}
    losses.pop(0)
    assert best.step == min(losses, key=lambda step: (losses[step], step))
    last = {"lora_ckpt_epoch_4.safetensors", "lora_ckpt_step_15.safetensors"}
    assert files == {best.name, *last}
    assert json.loads((tmp_path / "run.json").read_text())["best"] == best.name


def test_folder_of_another_run_is_refused(
    make_base: Callable[[], CSM], data: TrainingData, tmp_path: Path
) -> None:
    options = lora_options(tmp_path, epochs=1)
    Trainer(prepare_model(make_base(), options), data, options).run()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TrainingError, match=r"holds a run already \(finished\)"):
        Trainer(prepare_model(make_base(), options), data, options).run()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folder_in_use_is_refused_and_that_of_a_killed_run_resumed(
    make_base: Callable[[], CSM], data: TrainingData, tmp_path: Path
) -> None:
    options = lora_options(tmp_path)
    stop = StopAfter(2)
    Trainer(prepare_model(make_base(), options), data, options, stop.on_event, stop).run()
    manifest = json.loads((tmp_path / "run.json").read_text())
    parent = psutil.Process(os.getppid())
    manifest.update(status="running", pid=parent.pid, process_started=parent.create_time())
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    resume = find_resume_point(tmp_path)
    with pytest.raises(TrainingError, match="is training here"):
        Trainer(prepare_model(make_base(), options), data, options, resume=resume).run()
    # The number was given to another process since: the run was killed.
    manifest["process_started"] -= 1000
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    ended = Trainer(prepare_model(make_base(), options), data, options, resume=resume).run()
    assert ended.outcome == "finished"


def test_resume_into_the_folder_of_another_run_is_refused(
    make_base: Callable[[], CSM], data: TrainingData, tmp_path: Path
) -> None:
    for name in ("mine", "other"):
        options = lora_options(tmp_path / name)
        stop = StopAfter(2)
        Trainer(prepare_model(make_base(), options), data, options, stop.on_event, stop).run()
    resume = find_resume_point(tmp_path / "mine")
    options = lora_options(tmp_path / "other")
    with pytest.raises(TrainingError, match="other: holds a run already"):
        Trainer(prepare_model(make_base(), options), data, options, resume=resume).run()


def test_resume_with_other_settings_names_them(
    make_base: Callable[[], CSM], data: TrainingData, tmp_path: Path
) -> None:
    options = lora_options(tmp_path)
    stop = StopAfter(2)
    Trainer(prepare_model(make_base(), options), data, options, stop.on_event, stop).run()
    resume = find_resume_point(tmp_path)
    other = lora_options(tmp_path, batch_size=4, seed=1)
    with pytest.raises(TrainingError, match=r"--batch-size: 2 then, 4 now(.|\n)*--seed: 0 then"):
        Trainer(prepare_model(make_base(), other), data, other, resume=resume).run()


def test_resume_without_optimizer_state_is_refused(
    make_base: Callable[[], CSM], data: TrainingData, tmp_path: Path
) -> None:
    options = lora_options(tmp_path)
    ended = Trainer(prepare_model(make_base(), options), data, options).run()
    state_path(ended.checkpoint).unlink()
    with pytest.raises(TrainingError, match="optimizer's state is lost"):
        find_resume_point(ended.checkpoint)


def test_infinite_loss_stops_and_keeps_the_checkpoint(
    make_base: Callable[[], CSM], data: TrainingData, tmp_path: Path
) -> None:
    options = full_options(
        tmp_path, optimizer="sgd", learning_rate=1e30, max_grad_norm=0.0, save_every=1
    )
    with pytest.raises(TrainingError, match=r"not finite at step 2.*Lower --learning-rate"):
        Trainer(prepare_model(make_base(), options), data, options).run()
    assert (tmp_path / "ckpt_step_1.safetensors").exists()
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


def test_frozen_parts_stay(
    make_base: Callable[[], CSM], data: TrainingData, tmp_path: Path
) -> None:
    options = full_options(tmp_path, epochs=1, freeze_backbone=True, freeze_decoder=True)
    before = {name: np.array(v) for name, v in flatten(make_base().parameters()).items()}
    ended = Trainer(prepare_model(make_base(), options), data, options).run()
    moved = {n for n, v in arrays(ended.checkpoint).items() if not np.array_equal(v, before[n])}
    assert moved == {
        "text_embeddings.weight",
        "audio_embeddings.weight",
        "projection.weight",
        "codebook0_head.weight",
        "audio_head",
    }


def test_small_steps_are_not_lost_in_half_precision(
    make_base: Callable[[], CSM], data: TrainingData, tmp_path: Path
) -> None:
    base = make_base()
    base.set_dtype(mx.bfloat16)
    before = {
        name: np.array(v.astype(mx.float32)) for name, v in flatten(base.parameters()).items()
    }
    options = full_options(tmp_path, epochs=1, learning_rate=1e-5)
    ended = Trainer(prepare_model(base, options), data, options).run()
    after = arrays(ended.checkpoint)
    assert [n for n, value in after.items() if np.array_equal(value, before[n])] == []


def test_lora_with_embeddings_keeps_a_half_precision_base_so(
    make_base: Callable[[], CSM], data: TrainingData, tmp_path: Path
) -> None:
    base = make_base()
    base.set_dtype(mx.bfloat16)
    options = lora_options(tmp_path, epochs=1, train_embeddings=True)
    model = prepare_model(base, options)
    assert model.text_embeddings.weight.dtype == mx.float32
    assert model.backbone.layers[0].mlp.up_proj.weight.dtype == mx.bfloat16
    batch = build_batch(data.train[:1])
    hidden = model.hidden_states(mx.array(batch.tokens), mx.array(batch.mask))
    assert hidden.dtype == mx.bfloat16
    codes = mx.array(batch.tokens[0, -3:, :-1])
    assert model.depth_logits(hidden[0, -3:], codes).dtype == mx.bfloat16
    assert Trainer(model, data, options).run().outcome == "finished"


def test_full_checkpoint_loads_with_the_documented_call(
    make_base: Callable[[], CSM], tiny_csm_config: CSMConfig, data: TrainingData, tmp_path: Path
) -> None:
    options = full_options(tmp_path, epochs=1)
    model = prepare_model(make_base(), options)
    ended = Trainer(model, data, options).run()
    loaded = CSM(tiny_csm_config)
    loaded.load_weights(str(ended.checkpoint))
    for name, value in flatten(loaded.parameters()).items():
        np.testing.assert_array_equal(np.array(value), np.array(flatten(model.parameters())[name]))


def test_embeddings_twice_is_an_error() -> None:
    options = lora_options(Path("x"), target_modules=["audio_embeddings"], train_embeddings=True)
    with pytest.raises(OptionError, match="Choose one"):
        options.validate()
    with pytest.raises(OptionError, match="--batch-size is 0; it must be at least 1"):
        lora_options(Path("x"), batch_size=0).validate()


def test_unknown_target_is_refused_before_training(
    make_base: Callable[[], CSM], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="names nonsense"):
        prepare_model(make_base(), lora_options(tmp_path, target_modules=["nonsense"]))


def test_every_example_occurs_once_an_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 333).tolist()
    batches = epoch_batches(lengths, 4, seed=1, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(333))
    assert epoch_batches(lengths, 4, seed=1, epoch=0) == batches
    assert epoch_batches(lengths, 4, seed=1, epoch=1) != batches
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)


def test_frames_of_a_conversation(tiny_csm_config: CSMConfig) -> None:
    first, second = random_examples(tiny_csm_config, [2, 3])
    context = type(first.turns[0])(first.turns[0].text_ids, first.turns[0].codes, scored=False)
    conversation = type(first)((context, second.turns[0]))
    batch = build_batch([conversation])
    assert batch.tokens.shape[1] == conversation.num_frames
    num_text = len(context.text_ids)
    # The first turn ends with the all-zero frame, its audio mask on.
    assert batch.tokens[0, num_text + 2].tolist() == [0, 0, 0, 0, 0]
    assert batch.mask[0, num_text + 2].tolist() == [1, 1, 1, 1, 0]
    # Only the second turn is scored: its 3 frames and the end.
    start = num_text + 3 + len(second.turns[0].text_ids)
    assert batch.targets.tolist() == [[0, start + i] for i in range(4)]
    np.testing.assert_array_equal(batch.tokens[0, start : start + 3, :4], second.turns[0].codes.T)
