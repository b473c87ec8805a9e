"""From a waveform and text ids to loss and greedy speech, against transformers' own pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from csm_studio.configs import CSMConfig, MimiConfig
from csm_studio.dataset.batches import Batch, Example, Turn, build_batch
from csm_studio.generation.frames import FrameLoop
from csm_studio.generation.prompt import Prompt
from csm_studio.generation.settings import SamplingOptions
from csm_studio.models.csm import CSM
from csm_studio.models.mimi.codec import Mimi
from csm_studio.training.loss import CodebookWeights, DepthSample, batch_loss
from tests.conftest import load_arrays

NUM_AUDIO_FRAMES = (5, 6)


@pytest.fixture(scope="module")
def folder(parity_dir: Path) -> Path:
    return parity_dir / "csm_tiny4/hf"


@pytest.fixture(scope="module")
def model(folder: Path) -> CSM:
    values = json.loads((folder / "config.json").read_text())
    return CSM(CSMConfig.from_dict(values)).load_weights(folder)


@pytest.fixture(scope="module")
def io(parity_dir: Path) -> dict[str, mx.array]:
    return load_arrays(parity_dir / "train_tiny4/hf_end_to_end.safetensors")


@pytest.fixture(scope="module")
def conversation(folder: Path, io: dict[str, mx.array]) -> Example:
    """Encode both turns' audio with the codec inside the model's file."""
    values = json.loads((folder / "config.json").read_text())
    codec = Mimi(MimiConfig.from_dict(values["codec_config"])).load_file(folder)
    first_end, second_end = io["input_values_cutoffs"][0].tolist()
    wave, ids = io["input_values"], io["input_ids"][0].tolist()
    turns = (
        Turn(ids[:5], np.array(codec.encode(wave[None, :first_end])[0])),
        Turn(ids[11:17], np.array(codec.encode(wave[None, first_end:second_end])[0])),
    )
    assert tuple(turn.codes.shape[1] for turn in turns) == NUM_AUDIO_FRAMES
    return Example(turns)


def test_frames_of_the_prompt(conversation: Example, io: dict[str, mx.array]) -> None:
    batch = build_batch([conversation])
    length = batch.tokens.shape[1]
    np.testing.assert_array_equal(batch.tokens, np.array(io["prompt_frames"])[:, :length])
    np.testing.assert_array_equal(batch.mask, np.array(io["prompt_frames_mask"])[:, :length])


def test_losses(
    model: CSM, conversation: Example, parity_dir: Path, io: dict[str, mx.array]
) -> None:
    expected = json.loads((parity_dir / "train_tiny4/expected.json").read_text())
    cases = expected["hf_end_to_end [loss, backbone, depth]"]
    batch = build_batch([conversation])
    labels = np.array(io["merged_labels"])
    num_first = NUM_AUDIO_FRAMES[0] + 1
    num_targets = len(batch.targets)
    np.testing.assert_array_equal(batch.targets[:, 1], np.flatnonzero(labels[:, 0] != -100))
    context_free = np.arange(num_first, num_targets, dtype=np.int32)
    everything = np.arange(num_targets, dtype=np.int32)
    # For -101 transformers drops the context's frames from the depth loss, but not its end frame.
    without_context = np.concatenate([[num_first - 1], context_free]).astype(np.int32)
    scored_only = Batch(batch.tokens, batch.mask, batch.targets[num_first:])
    weights = CodebookWeights.transformers(model.config.audio_num_codebooks)
    for case, scored, chosen in (
        ("processor_labels", batch, everything),
        ("context_minus101", batch, without_context),
        ("context_really_masked(3-D labels)", scored_only, context_free - num_first),
    ):
        count = len(scored.targets)
        depth = DepthSample(chosen.astype(np.int32), count / len(chosen))
        got = [part.item() for part in batch_loss(model, scored, depth, weights, count)]
        np.testing.assert_allclose(got, cases[case], atol=1e-4, err_msg=case)


def test_greedy_speech(model: CSM, io: dict[str, mx.array]) -> None:
    prompt = Prompt(io["prompt_frames"], io["prompt_frames_mask"].astype(mx.bool_))
    loop = FrameLoop(model, prompt, SamplingOptions(temperature=0.0), seed=0)
    for frame in io["greedy_frames"].tolist():
        loop.enqueue()
        assert loop.wait().tolist() == frame
