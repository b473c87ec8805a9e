"""LoRA: identities with the base model, exactly the right tensors trained, clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from csm_studio.checkpoints.weights import fingerprint, flatten, read_description
from csm_studio.configs import CSMConfig, csm_1b
from csm_studio.dataset.batches import build_batch
from csm_studio.errors import AdapterError, WeightsError
from csm_studio.models.adapters import (
    load_lora_weights,
    save_lora_weights,
)
from csm_studio.models.csm import CSM
from csm_studio.models.lora import (
    apply_lora_to_model,
    base_fingerprint,
    merge_lora_weights,
    resolve_targets,
    train_embeddings,
)
from csm_studio.training.loss import CodebookWeights, DepthSample, batch_loss, cross_entropies
from tests.test_loss import random_examples

EVERYTHING = ("attn", "mlp", "codebook0_head", "projection", "audio_head", "text_embeddings")


@pytest.fixture
def make_model(tiny_csm_config: CSMConfig) -> Callable[[], CSM]:
    """Return copies of one random model."""
    mx.random.seed(7)
    weights = list(flatten(CSM(tiny_csm_config).parameters()).items())

    def make() -> CSM:
        return CSM(tiny_csm_config).load_weights(weights)

    return make


def outputs(model: CSM) -> np.ndarray:
    """Return every cross entropy of a fixed batch, a function of all parts of the model."""
    batch = build_batch(random_examples(model.config, [6, 9]))
    every = DepthSample.draw(len(batch.targets), 1.0, np.random.default_rng(0))
    first, others = cross_entropies(model, batch, every)
    return np.concatenate([np.array(first), np.array(others).ravel()])


def train_a_little(model: CSM, num_steps: int = 2) -> dict[str, bool]:
    """Take optimizer steps and tell for each tensor whether it moved."""
    before = {name: np.array(value) for name, value in flatten(model.parameters()).items()}
    batch = build_batch(random_examples(model.config, [6, 9]))
    every = DepthSample.draw(len(batch.targets), 1.0, np.random.default_rng(0))
    weights = CodebookWeights.csm_mlx(model.config.audio_num_codebooks)
    step = nn.value_and_grad(model, lambda *arguments: batch_loss(model, *arguments)[0])
    optimizer = optim.Adam(learning_rate=1e-2)
    for _ in range(num_steps):
        _, gradients = step(batch, every, weights, len(batch.targets))
        optimizer.update(model, gradients)
    after = flatten(model.parameters())
    return {name: not np.array_equal(before[name], np.array(after[name])) for name in before}


def test_fresh_adapter_changes_nothing(make_model: Callable[[], CSM]) -> None:
    adapted = apply_lora_to_model(make_model(), target_modules=EVERYTHING)
    np.testing.assert_array_equal(outputs(make_model()), outputs(adapted))


@pytest.mark.parametrize("target", [*EVERYTHING, "audio_embeddings", "q_proj"])
def test_merged_equals_base_and_adapter(make_model: Callable[[], CSM], target: str) -> None:
    model = apply_lora_to_model(make_model(), 4, 8.0, [target])
    train_a_little(model)
    adapted = outputs(model)
    merged = merge_lora_weights(model)
    assert np.abs(adapted - outputs(make_model())).max() > 1e-3
    np.testing.assert_allclose(outputs(merged), adapted, atol=2e-5)
    names = set(flatten(merged.parameters()))
    assert names == set(flatten(make_model().parameters()))
    assert set(flatten(merged.trainable_parameters())) == names


def test_lora_trains_adapters_only(make_model: Callable[[], CSM]) -> None:
    moved = train_a_little(apply_lora_to_model(make_model()))
    assert {name for name, has_moved in moved.items() if has_moved} == {
        name for name in moved if name.endswith((".lora_a", ".lora_b"))
    }


def test_lora_with_embeddings_trains_both_tables_too(make_model: Callable[[], CSM]) -> None:
    model = apply_lora_to_model(make_model())
    train_embeddings(model)
    moved = train_a_little(model)
    assert {name for name, has_moved in moved.items() if has_moved} == {
        name
        for name in moved
        if name.endswith((".lora_a", ".lora_b"))
        or name in ("text_embeddings.weight", "audio_embeddings.weight")
    }


def test_full_finetuning_trains_everything(make_model: Callable[[], CSM]) -> None:
    assert all(train_a_little(make_model()).values())


def test_attn_means_every_projection_of_both_transformers(make_model: Callable[[], CSM]) -> None:
    paths = resolve_targets(make_model(), ["attn"])
    assert paths == sorted(
        f"{part}.layers.{layer}.self_attn.{letter}_proj"
        for part in ("backbone", "decoder")
        for layer in (0, 1)
        for letter in "qkvo"
    )
    assert resolve_targets(make_model(), ["backbone.layers.1.mlp.up_proj"]) == [
        "backbone.layers.1.mlp.up_proj"
    ]


def test_unknown_target_is_an_error(make_model: Callable[[], CSM]) -> None:
    with pytest.raises(AdapterError, match=r"names attention, blah.*codebook0_head"):
        apply_lora_to_model(make_model(), target_modules=["attn", "attention", "blah"])


def test_embeddings_are_not_adapted_and_trained_whole(make_model: Callable[[], CSM]) -> None:
    model = apply_lora_to_model(make_model(), target_modules=["attn", "text_embeddings"])
    with pytest.raises(AdapterError, match=r"text_embeddings cannot be both"):
        train_embeddings(model)


@pytest.mark.parametrize("whole_embeddings", [False, True])
def test_saved_adapter_loads_into_a_plain_model(
    make_model: Callable[[], CSM], tmp_path: Path, whole_embeddings: bool
) -> None:
    model = apply_lora_to_model(make_model(), 3, 5.0, ["attn", "audio_head"])
    if whole_embeddings:
        train_embeddings(model)
    train_a_little(model)
    path = tmp_path / "adapter.safetensors"
    save_lora_weights(model, path, {"base_model": "tiny"})
    loaded = load_lora_weights(make_model(), path)
    np.testing.assert_array_equal(outputs(loaded), outputs(model))
    assert loaded.adapter == model.adapter
    described = read_description(path)
    assert (described["rank"], described["alpha"]) == (3, 5.0)
    assert described["base_model"] == "tiny"


def test_saved_adapter_loads_as_the_specification_writes_it(
    make_model: Callable[[], CSM], tmp_path: Path
) -> None:
    model = apply_lora_to_model(make_model(), rank=8, alpha=16.0, target_modules=["attn"])
    train_a_little(model)
    save_lora_weights(model, tmp_path / "a.safetensors")
    again = apply_lora_to_model(make_model(), rank=8, alpha=16.0, target_modules=["attn"])
    again = load_lora_weights(again, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(outputs(again), outputs(model))


@pytest.mark.parametrize(
    ("rank", "alpha", "targets", "words"),
    [
        (4, 16.0, ["attn"], "rank is 8 in the file and 4"),
        (8, 2.0, ["attn"], "alpha is 16.0 in the file and 2.0"),
        (8, 16.0, ["mlp"], r"target_modules are \['attn'\] in the file and \['mlp'\]"),
    ],
)
def test_adapter_of_another_structure_is_refused(
    make_model: Callable[[], CSM],
    tmp_path: Path,
    rank: int,
    alpha: float,
    targets: list[str],
    words: str,
) -> None:
    save_lora_weights(
        apply_lora_to_model(make_model(), 8, 16.0, ["attn"]), tmp_path / "a.safetensors"
    )
    other = apply_lora_to_model(make_model(), rank, alpha, targets)
    with pytest.raises(AdapterError, match=words):
        load_lora_weights(other, tmp_path / "a.safetensors")


def test_adapter_of_another_base_is_refused(
    make_model: Callable[[], CSM], tiny_csm_config: CSMConfig, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_lora_weights(apply_lora_to_model(make_model()), path, {"base_model": "the-other"})
    mx.random.seed(99)
    stranger = CSM(tiny_csm_config)
    before = outputs(stranger)
    with pytest.raises(AdapterError, match=r"another base model \(the-other"):
        load_lora_weights(stranger, path)
    assert stranger.adapter is None
    np.testing.assert_array_equal(outputs(stranger), before)


def test_fingerprint_survives_dtype_and_adapter(make_model: Callable[[], CSM]) -> None:
    model = make_model()
    half = make_model()
    half.set_dtype(mx.bfloat16)
    fingerprint = base_fingerprint(model)
    assert base_fingerprint(half) == fingerprint
    assert base_fingerprint(apply_lora_to_model(model, target_modules=EVERYTHING)) == fingerprint
    changed = make_model()
    changed.projection.weight = changed.projection.weight + 0.1
    assert base_fingerprint(changed) != fingerprint


def test_bf16_base_stays_bf16_with_float32_adapters(make_model: Callable[[], CSM]) -> None:
    model = make_model()
    model.set_dtype(mx.bfloat16)
    apply_lora_to_model(model, target_modules=EVERYTHING)
    batch = build_batch(random_examples(model.config, [4]))
    hidden = model.hidden_states(mx.array(batch.tokens), mx.array(batch.mask))
    assert hidden.dtype == mx.bfloat16
    adapters = flatten(model.trainable_parameters()).values()
    assert {value.dtype for value in adapters} == {mx.float32}


def test_damaged_adapter_file_lists_what_differs(
    make_model: Callable[[], CSM], tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    model = apply_lora_to_model(make_model(), target_modules=["projection", "codebook0_head"])
    save_lora_weights(model, path)
    tensors, header = mx.load(str(path), return_metadata=True)
    mx.eval(tensors)
    tensors["stray"] = tensors.pop("projection.lora_a")
    tensors["codebook0_head.lora_b"] = tensors["codebook0_head.lora_b"][:, :5]
    mx.save_safetensors(str(path), tensors, header)
    with pytest.raises(WeightsError) as caught:
        load_lora_weights(make_model(), path)
    message = str(caught.value)
    assert "missing projection.lora_a" in message
    assert "unexpected stray" in message
    assert "codebook0_head.lora_b has shape (8, 5)" in message


def test_refused_adapter_leaves_a_plain_model_plain(
    make_model: Callable[[], CSM], tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_lora_weights(apply_lora_to_model(make_model()), path)
    tensors, header = mx.load(str(path), return_metadata=True)
    mx.eval(tensors)
    tensors.popitem()
    mx.save_safetensors(str(path), tensors, header)
    model = make_model()
    with pytest.raises(WeightsError, match="missing"):
        load_lora_weights(model, path)
    assert model.adapter is None
    np.testing.assert_array_equal(outputs(model), outputs(make_model()))


def test_fingerprint_counts_beyond_float32() -> None:
    # 2^24 + 1 places: in float32 the last one would be rounded past the end.
    large = mx.zeros(2**24 + 2, dtype=mx.bfloat16)
    other = mx.zeros(2**24 + 2, dtype=mx.bfloat16)
    other[-1] = 1.0
    assert fingerprint({"t": large}) != fingerprint({"t": other})


def test_csm_1b_has_the_published_size() -> None:
    # Arrays are lazy: nothing of the 1.5 billion parameters is allocated.
    parameters = flatten(CSM(csm_1b()).parameters())
    assert len(parameters) == 187
    assert sum(value.size for value in parameters.values()) == 1_552_791_552
