"""Both published losses and their gradients against the official code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from csm_studio.checkpoints.formats import read_csm
from csm_studio.checkpoints.weights import flatten, shapes_of
from csm_studio.configs import CSMConfig
from csm_studio.dataset.batches import Batch, Example, Turn, build_batch
from csm_studio.models.csm import CSM
from csm_studio.training.loss import CodebookWeights, DepthSample, batch_loss, cross_entropies
from tests.conftest import load_arrays

K = 4


@pytest.fixture
def model(parity_dir: Path) -> CSM:
    config = CSMConfig.from_dict(json.loads((parity_dir / "csm_tiny4/config.json").read_text()))
    return CSM(config).load_weights(parity_dir / "csm_tiny4/sesame/model.safetensors")


@pytest.fixture(scope="module")
def arrays(parity_dir: Path) -> dict[str, np.ndarray]:
    loaded = load_arrays(parity_dir / "train_tiny4/batch.safetensors")
    return {name: np.array(value) for name, value in loaded.items()}


@pytest.fixture(scope="module")
def expected(parity_dir: Path) -> dict[str, Any]:
    return json.loads((parity_dir / "train_tiny4/expected.json").read_text())


def scored(arrays: dict[str, np.ndarray], case: str) -> tuple[Batch, DepthSample]:
    """Build the batch of a case from the labels that transformers was given."""
    labels = arrays[f"hf_labels_{case}"]
    targets = np.argwhere(labels[:, :, 0] != -100)
    with_depth = labels[targets[:, 0], targets[:, 1], 1] != -100
    chosen = np.flatnonzero(with_depth).astype(np.int32)
    batch = Batch(arrays["tokens"], arrays["masks"], targets.astype(np.int32))
    return batch, DepthSample(chosen, len(targets) / len(chosen))


@pytest.mark.parametrize("case", ["all", "context_masked", "depth_half"])
def test_transformers_loss(
    model: CSM, arrays: dict[str, np.ndarray], expected: dict[str, Any], case: str
) -> None:
    batch, depth = scored(arrays, case)
    weights = CodebookWeights.transformers(K)
    loss, first, others = batch_loss(model, batch, depth, weights, len(batch.targets))
    assert len(batch.targets) == expected[case]["frames_c0"]
    assert loss.item() == pytest.approx(expected[case]["hf_loss"], abs=1e-4)
    assert first.item() == pytest.approx(expected[case]["hf_backbone"], abs=1e-4)
    assert others.item() == pytest.approx(expected[case]["hf_depth"], abs=1e-4)


@pytest.mark.parametrize("case", ["all", "context_masked"])
@pytest.mark.parametrize("first_weight", [1, 2])
def test_csm_mlx_loss(
    model: CSM,
    arrays: dict[str, np.ndarray],
    expected: dict[str, Any],
    case: str,
    first_weight: int,
) -> None:
    batch, depth = scored(arrays, case)
    weights = CodebookWeights.csm_mlx(K, first_weight)
    loss, _, _ = batch_loss(model, batch, depth, weights, len(batch.targets))
    assert loss.item() == pytest.approx(expected[case][f"csm_mlx_fcw{first_weight}"], abs=1e-4)


def test_cross_entropy_of_each_code(model: CSM, arrays: dict[str, np.ndarray]) -> None:
    batch, depth = scored(arrays, "all")
    np.testing.assert_array_equal(batch.targets, arrays["target_positions"])
    first, others = cross_entropies(model, batch, depth)
    np.testing.assert_allclose(np.array(first), arrays["ce_c0"], atol=1e-4)
    np.testing.assert_allclose(np.array(others), arrays["ce_ci"], atol=1e-4)


@pytest.mark.parametrize("definition", ["csm_mlx", "transformers"])
def test_gradients(
    model: CSM,
    arrays: dict[str, np.ndarray],
    expected: dict[str, Any],
    parity_dir: Path,
    definition: str,
) -> None:
    short = {"csm_mlx": "csm_mlx", "transformers": "hf"}[definition]
    batch, depth = scored(arrays, "all")
    weights = getattr(CodebookWeights, definition)(K)

    def compute(*arguments: Any) -> mx.array:
        return batch_loss(model, *arguments)[0]

    _, gradients = nn.value_and_grad(model, compute)(batch, depth, weights, len(batch.targets))
    flat = flatten(gradients)
    norm = mx.sqrt(sum((g * g).sum() for g in flat.values())).item()
    assert norm == pytest.approx(expected[f"grad_norm_{short}"], rel=1e-4)
    file = parity_dir / f"train_tiny4/grads_{short}.safetensors"
    if file.exists():
        published = read_csm(file, model.config, shapes_of(model.parameters()))
        for name, gradient in flat.items():
            np.testing.assert_allclose(
                np.array(gradient), np.array(published[name]), atol=1e-4, err_msg=name
            )


@pytest.mark.parametrize("definition", ["csm_mlx", "transformers"])
def test_sgd_trajectory(
    model: CSM, arrays: dict[str, np.ndarray], expected: dict[str, Any], definition: str
) -> None:
    short = {"csm_mlx": "csm_mlx", "transformers": "hf"}[definition]
    batch, depth = scored(arrays, "all")
    weights = getattr(CodebookWeights, definition)(K)
    step = nn.value_and_grad(model, lambda *arguments: batch_loss(model, *arguments)[0])
    optimizer = optim.SGD(learning_rate=0.05)
    losses = []
    for _ in expected[f"sgd_lr0.05_{short}"]:
        loss, gradients = step(batch, depth, weights, len(batch.targets))
        optimizer.update(model, gradients)
        losses.append(loss.item())
    np.testing.assert_allclose(losses, expected[f"sgd_lr0.05_{short}"], atol=2e-3)


def random_examples(config: CSMConfig, lengths: list[int], seed: int = 0) -> list[Example]:
    """Make one-turn examples of so many audio frames."""
    rng = np.random.default_rng(seed)
    size = config.audio_vocab_size - 3
    return [
        Example(
            (
                Turn(
                    rng.integers(0, config.text_vocab_size, 5 + length % 3).tolist(),
                    rng.integers(0, size, (config.audio_num_codebooks, length)).astype(np.int32),
                ),
            )
        )
        for length in lengths
    ]


def test_batch_of_four_equals_two_of_two(tiny_csm_config: CSMConfig) -> None:
    model = CSM(tiny_csm_config)
    examples = random_examples(tiny_csm_config, [3, 19, 7, 12])
    weights = CodebookWeights.csm_mlx(K)
    rng = np.random.default_rng(0)

    def gradients(parts: list[list[Example]]) -> tuple[float, dict[str, mx.array]]:
        batches = [build_batch(part) for part in parts]
        total = sum(len(batch.targets) for batch in batches)
        loss, summed = 0.0, {}
        for batch in batches:
            depth = DepthSample.draw(len(batch.targets), 1.0, rng)
            value, gradient = nn.value_and_grad(
                model, lambda *arguments: batch_loss(model, *arguments)[0]
            )(batch, depth, weights, total)
            loss += value.item()
            for name, part in flatten(gradient).items():
                summed[name] = summed[name] + part if name in summed else part
        return loss, summed

    whole_loss, whole = gradients([examples])
    parts_loss, parts = gradients([examples[:2], examples[2:]])
    assert whole_loss == pytest.approx(parts_loss, rel=1e-5)
    for name, gradient in whole.items():
        np.testing.assert_allclose(
            np.array(gradient), np.array(parts[name]), atol=2e-6, err_msg=name
        )


def test_sampled_depth_loss_is_unbiased(tiny_csm_config: CSMConfig) -> None:
    model = CSM(tiny_csm_config)
    batch = build_batch(random_examples(tiny_csm_config, [9, 14]))
    every = DepthSample.draw(len(batch.targets), 1.0, np.random.default_rng(0))
    per_frame = np.array(cross_entropies(model, batch, every)[1]).sum(axis=1)
    estimates = []
    for seed in range(400):
        sample = DepthSample.draw(len(batch.targets), 0.25, np.random.default_rng(seed))
        estimates.append(per_frame[sample.chosen].sum() * sample.scale)
    spread = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - per_frame.sum()) < 4 * spread
    assert spread > 0


def test_padding_changes_nothing(tiny_csm_config: CSMConfig) -> None:
    model = CSM(tiny_csm_config)
    short, long = random_examples(tiny_csm_config, [4, 30])
    alone = build_batch([short])
    padded = build_batch([short, long])
    count = len(alone.targets)
    every = DepthSample.draw(count, 1.0, np.random.default_rng(0))
    first, others = cross_entropies(model, alone, every)
    everything = DepthSample.draw(len(padded.targets), 1.0, np.random.default_rng(0))
    first_padded, others_padded = cross_entropies(model, padded, everything)
    np.testing.assert_allclose(np.array(first), np.array(first_padded[:count]), atol=1e-5)
    np.testing.assert_allclose(np.array(others), np.array(others_padded[:count]), atol=1e-5)


def test_gradient_checkpointing_changes_nothing(tiny_csm_config: CSMConfig) -> None:
    model = CSM(tiny_csm_config)
    batch = build_batch(random_examples(tiny_csm_config, [6, 11]))
    every = DepthSample.draw(len(batch.targets), 1.0, np.random.default_rng(0))
    weights = CodebookWeights.csm_mlx(K)

    def compute() -> dict[str, np.ndarray]:
        step = nn.value_and_grad(model, lambda *arguments: batch_loss(model, *arguments)[0])
        _, gradients = step(batch, every, weights, len(batch.targets))
        return {name: np.array(value) for name, value in flatten(gradients).items()}

    plain = compute()
    model.backbone.gradient_checkpointing = model.decoder.gradient_checkpointing = True
    recomputed = compute()
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        np.testing.assert_allclose(value, recomputed[name], atol=1e-6, err_msg=name)
