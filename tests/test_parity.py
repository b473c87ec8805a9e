"""CSM and Mimi against the official PyTorch code, on random weights at tiny size.

The committed fixtures hold a part of the data; `CSM_STUDIO_PARITY_DIR` names a folder of the same
layout with more (all layouts, HF gradients, the end-to-end prompt).
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from csm_studio.configs import CSMConfig, MimiConfig
from csm_studio.models.csm import CSM
from csm_studio.models.mimi.codec import Mimi
from tests.conftest import load_arrays, neutral_mimi_config

TOLERANCE = 1e-4

CSM_FILES = (
    "csm_tiny4/sesame/model.safetensors",
    "csm_tiny4/mlx/ckpt.safetensors",
    "csm_tiny4/hf/model.safetensors",
)
MIMI_FILES = (
    "mimi_tiny/kyutai/tokenizer-e351c8d8-checkpoint125.safetensors",
    "mimi_tiny/hf/model.safetensors",
)


def _existing(root: Path, name: str) -> Path:
    if not (root / name).exists():
        pytest.skip(f"{name} is not among the committed fixtures")
    return root / name


@pytest.fixture(params=CSM_FILES)
def csm(request: pytest.FixtureRequest, parity_dir: Path) -> CSM:
    weights = _existing(parity_dir, request.param)
    config = CSMConfig.from_dict(json.loads((parity_dir / "csm_tiny4/config.json").read_text()))
    return CSM(config).load_weights(weights)


@pytest.fixture(scope="module")
def csm_io(parity_dir: Path) -> dict[str, mx.array]:
    return load_arrays(parity_dir / "csm_tiny4/io.safetensors")


@pytest.fixture(params=MIMI_FILES)
def mimi(request: pytest.FixtureRequest, parity_dir: Path) -> Mimi:
    weights = _existing(parity_dir, request.param)
    return Mimi(neutral_mimi_config(parity_dir / "mimi_tiny/config.json")).load_file(weights)


@pytest.fixture(scope="module")
def mimi_io(parity_dir: Path) -> dict[str, mx.array]:
    return load_arrays(parity_dir / "mimi_tiny/io.safetensors")


def assert_close(actual: mx.array, expected: mx.array, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.array(actual), np.array(expected), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["hf/config.json", "hf/config_v5.json"])
def test_transformers_configs_describe_the_same_model(parity_dir: Path, name: str) -> None:
    path = _existing(parity_dir, f"csm_tiny4/{name}")
    neutral = CSMConfig.from_dict(json.loads((parity_dir / "csm_tiny4/config.json").read_text()))
    theirs = CSMConfig.from_dict(json.loads(path.read_text()))
    # HF caps the depth decoder's positions at K + 1; nothing is computed from that.
    assert theirs.backbone == neutral.backbone
    assert theirs.decoder.rope_scaling == neutral.decoder.rope_scaling
    assert theirs.audio_vocab_size == neutral.audio_vocab_size


@pytest.mark.parametrize("name", ["hf/config.json", "hf/config_v5.json"])
def test_transformers_mimi_configs_describe_the_same_codec(parity_dir: Path, name: str) -> None:
    path = _existing(parity_dir, f"mimi_tiny/{name}")
    theirs = MimiConfig.from_dict(json.loads(path.read_text()))
    assert theirs == neutral_mimi_config(parity_dir / "mimi_tiny/config.json")


def test_teacher_forced_outputs(csm: CSM, csm_io: dict[str, mx.array]) -> None:
    hidden = csm.hidden_states(csm_io["tokens"], csm_io["tokens_mask"])
    assert_close(hidden, csm_io["hidden"])
    assert_close(csm.codebook0_logits(hidden), csm_io["c0_logits"])
    at = csm_io["depth_positions"]
    codes = csm_io["tokens"][0, at, :-1]
    assert_close(csm.depth_logits(hidden[0, at - 1], codes), csm_io["depth_logits"])


def test_long_prompt_where_rope_scaling_matters(csm: CSM, csm_io: dict[str, mx.array]) -> None:
    tokens = csm_io["long_tokens"]
    hidden = csm.hidden_states(tokens, csm_io["long_tokens_mask"])
    select = csm_io["long_select"]
    assert_close(hidden[0, select], csm_io["long_hidden_selected"])
    assert_close(csm.codebook0_logits(hidden[0, select]), csm_io["long_c0_logits_selected"])
    at = csm_io["long_depth_positions"]
    logits = csm.depth_logits(hidden[0, at - 1], tokens[0, at, :-1])
    assert_close(logits, csm_io["long_depth_logits"])


def test_greedy_frames_with_caches(csm: CSM, csm_io: dict[str, mx.array]) -> None:
    num_codebooks = csm.config.audio_num_codebooks
    tokens, mask = csm_io["tokens"], csm_io["tokens_mask"]
    caches = csm.backbone.make_caches(block=16)
    for step, frame in enumerate(csm_io["greedy_frames"]):
        hidden = csm.hidden_states(tokens, mask, caches)[:, -1]
        logits = csm.codebook0_logits(hidden)
        assert_close(logits[0], csm_io["greedy_c0_logits"][step])
        codes = [mx.argmax(logits, axis=-1)]
        depth_caches = csm.decoder.make_caches(block=num_codebooks)
        logits = csm.depth_start(hidden, codes[0], depth_caches)
        for codebook in range(1, num_codebooks):
            assert_close(logits[0], csm_io["greedy_depth_logits"][step, codebook - 1])
            codes.append(mx.argmax(logits, axis=-1))
            if codebook < num_codebooks - 1:
                logits = csm.depth_step(codes[-1], codebook, depth_caches)
        assert [code.item() for code in codes] == frame.tolist()
        tokens = mx.concatenate([frame, mx.array([0])])[None, None].astype(mx.int32)
        mask = mx.array([[[1] * num_codebooks + [0]]])


def test_codes_of_every_length(mimi: Mimi, mimi_io: dict[str, mx.array]) -> None:
    for length in mimi_io["lengths"].tolist():
        codes = mimi.encode(mimi_io["waveform"][None, :length])
        assert codes[0].tolist() == mimi_io[f"codes_{length}"].tolist(), length


def test_latents(mimi: Mimi, mimi_io: dict[str, mx.array]) -> None:
    latents = mimi.encode_latents(mimi_io["waveform"][None])
    assert_close(latents[0].T, mimi_io["latents_38400"])


@pytest.mark.parametrize("num_frames", [1, 20])
def test_decoded_waveform(mimi: Mimi, mimi_io: dict[str, mx.array], num_frames: int) -> None:
    codes = mimi_io["decode_codes_20"][None, :, :num_frames]
    assert_close(mimi.decode(codes)[0], mimi_io[f"decode_waveform_{num_frames}"])


def test_decoding_past_the_attention_window(mimi: Mimi, mimi_io: dict[str, mx.array]) -> None:
    audio = mimi.decode(mimi_io["decode_codes_140"][None])
    expected = mimi_io["decode_waveform_140_last10"]
    assert_close(audio[0, -expected.shape[0] :], expected)


def test_streamed_decoding_past_the_window(mimi: Mimi, mimi_io: dict[str, mx.array]) -> None:
    codes = mimi_io["decode_codes_140"][None]
    state = mimi.decoder_state()
    chunks = [mimi.decode(codes[:, :, i : i + 1], state) for i in range(codes.shape[2])]
    expected = mimi_io["decode_waveform_140_last10"]
    assert_close(mx.concatenate(chunks, axis=1)[0, -expected.shape[0] :], expected)
