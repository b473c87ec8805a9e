"""Every training flag runs from the command line and does what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from csm_studio.audio.io import write_wav
from csm_studio.checkpoints.weights import read_description
from csm_studio.configs import CSMConfig, MimiConfig
from csm_studio.finetune import finetune, finetune_lora
from csm_studio.model_folder import save_model_folder
from tests.tiny_voice import make_voice

Train = Callable[..., Path]


@pytest.fixture
def train(
    tiny_csm_config: CSMConfig,
    tiny_mimi_config: MimiConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Train:
    """Return a function that runs a command on six two-turn conversations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CSM_STUDIO_CACHE", str(tmp_path / "cache"))
    save_model_folder(make_voice(tiny_csm_config, tiny_mimi_config), Path("voice"), "Tiny")
    rng = np.random.default_rng(0)
    conversations = []
    for index in range(6):
        turns = []
        for speaker in (0, 1):
            name = f"clip{index}_{speaker}.wav"
            write_wav(name, rng.normal(0, 0.1, 5_000 + 1_500 * index).astype(np.float32))
            turns.append({"text": f"Turn {index}.", "audio_path": name, "speaker_id": speaker})
        conversations.append(turns)
    Path("dataset.json").write_text(json.dumps(conversations))

    def run(flags: Sequence[str], full: bool = False, folder: str = "out") -> Path:
        common = ["--data-path", "dataset.json", "--model", "voice", "--output-dir", folder]
        short = ["--batch-size", "2", "--epochs", "2", "--log-every", "1", "--val-split", "0.2"]
        (finetune if full else finetune_lora).main([*common, *short, *flags])
        return Path(folder)

    return run


def losses(folder: Path, event: str = "step") -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == event]


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "sgd", "--weight-decay", "0"],
        ["--optimizer", "adam", "--lr-schedule", "linear", "--warmup-steps", "1"],
        ["--target-modules", "mlp", "audio_head", "text_embeddings", "audio_embeddings"],
        ["--target-modules", "backbone.layers.0.self_attn.q_proj", "--lora-rank", "2"],
        ["--train-embeddings", "--gradient-checkpointing"],
        ["--grad-accumulation-steps", "3", "--max-grad-norm", "0"],
        ["--loss", "transformers", "--first-codebook-weight", "2", "--depth-frame-ratio", "1.0"],
        ["--mask-speaker-ids", "1", "--save-every", "1", "--keep-last", "1"],
        ["--max-audio-length-ms", "400", "--max-samples", "5"],
    ],
    ids=" ".join,
)
def test_flag_runs(train: Train, flags: list[str]) -> None:
    folder = train(flags)
    assert np.isfinite(losses(folder)).all()
    assert (folder / "lora_ckpt_epoch_2.safetensors").exists()


@pytest.mark.parametrize("flags", [["--freeze-backbone"], ["--freeze-decoder"]], ids=" ".join)
def test_full_flag_runs(train: Train, flags: list[str]) -> None:
    assert (train(flags, full=True) / "ckpt_epoch_2.safetensors").exists()


def test_gradient_checkpointing_changes_no_loss(train: Train) -> None:
    plain = losses(train([], folder="plain"))
    recomputed = losses(train(["--gradient-checkpointing"], folder="recomputed"))
    np.testing.assert_allclose(plain, recomputed, rtol=1e-5)


def test_masked_speaker_halves_what_is_scored(train: Train) -> None:
    everyone = train([], folder="everyone")
    masked = train(["--mask-speaker-ids", "1"], folder="masked")
    described = read_description(masked / "lora_ckpt_epoch_2.safetensors")
    assert described["training"]["mask_speaker_ids"] == [1]
    assert losses(everyone, "validation")[0] != losses(masked, "validation")[0]


def test_pretrained_weights_replace_the_models_own(train: Train) -> None:
    checkpoint = train(["--learning-rate", "1e-2"], full=True, folder="full")
    path = checkpoint / "ckpt_epoch_2.safetensors"
    own = train([], folder="own")
    tuned = train(["--pretrained-path", str(path)], folder="tuned")
    trained = losses(checkpoint, "validation")[-1]
    assert losses(tuned, "validation")[0] == pytest.approx(trained, rel=1e-5)
    assert losses(own, "validation")[0] != pytest.approx(trained, rel=1e-5)
    described = read_description(tuned / "lora_ckpt_epoch_2.safetensors")
    assert described["base_model"] == str(path.resolve())
