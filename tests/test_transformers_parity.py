"""CSM and Mimi against HF transformers: committed outputs, and live where torch is installed."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from csm_studio.checkpoints.formats import read_csm, to_transformers_csm
from csm_studio.checkpoints.weights import flatten, shapes_of
from csm_studio.configs import CSMConfig, MimiConfig
from csm_studio.errors import WeightsError
from csm_studio.models.csm import CSM
from csm_studio.models.mimi.codec import Mimi
from tests.conftest import FIXTURES, load_arrays


@pytest.fixture(params=["committed", "live"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "committed":
        return FIXTURES / "transformers_tiny"
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.fixtures.make_transformers_tiny import make

    make(tmp_path)
    return tmp_path


def load(folder: Path) -> tuple[CSM, Mimi, dict[str, mx.array]]:
    values = json.loads((folder / "config.json").read_text())
    csm = CSM(CSMConfig.from_dict(values)).load_weights(folder)
    mimi = Mimi(MimiConfig.from_dict(values["codec_config"])).load_file(folder)
    return csm, mimi, load_arrays(folder / "io.safetensors")


def assert_close(actual: mx.array, expected: mx.array) -> None:
    np.testing.assert_allclose(np.array(actual), np.array(expected), atol=1e-4)


def test_sharded_model_with_its_codec(folder: Path) -> None:
    csm, mimi, io = load(folder)
    assert mimi.encode(io["waveform"][None])[0].tolist() == io["codes"].tolist()
    assert_close(mimi.decode(io["decode_codes"][None])[0], io["decoded"])
    assert_close(csm.depth_logits(io["depth_hidden"], io["depth_codes"]), io["depth_logits"])
    frames = mx.pad(io["audio_frames"][None], [(0, 0), (0, 0), (0, 1)])
    mask = mx.pad(mx.ones(io["audio_frames"].shape)[None], [(0, 0), (0, 0), (0, 1)])
    hidden = csm.hidden_states(frames, mask)
    assert_close(hidden[0], io["hidden"])
    assert_close(csm.codebook0_logits(hidden)[0], io["c0_logits"])


def test_written_layout_reads_back(folder: Path, tmp_path: Path) -> None:
    csm, _, _ = load(folder)
    ours = flatten(csm.parameters())
    path = tmp_path / "flat.safetensors"
    mx.save_safetensors(str(path), to_transformers_csm(ours, csm.config))
    again = read_csm(path, csm.config, shapes_of(csm.parameters()))
    for name, value in ours.items():
        np.testing.assert_array_equal(np.array(value), np.array(again[name]), err_msg=name)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    committed = FIXTURES / "transformers_tiny"
    for path in committed.iterdir():
        if "00002" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    values = json.loads((committed / "config.json").read_text())
    with pytest.raises(WeightsError, match=r"shards missing beside it: model-00002"):
        CSM(CSMConfig.from_dict(values)).load_weights(tmp_path)
