"""The training commands as a user runs them: wrong input, Ctrl-C, resume, and the result."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from csm_studio.audio.io import write_wav
from csm_studio.configs import CSMConfig, MimiConfig
from csm_studio.generation.generator import generate
from csm_studio.model_folder import load_model, save_model_folder
from tests.tiny_voice import make_voice

ROOT = Path(__file__).parents[1]
LORA = "csm_studio.finetune.finetune_lora"
FULL = "csm_studio.finetune.finetune"


@pytest.fixture
def workplace(tiny_csm_config: CSMConfig, tiny_mimi_config: MimiConfig, tmp_path: Path) -> Path:
    """A folder with a tiny voice and a dataset of eight clips of noise."""
    save_model_folder(make_voice(tiny_csm_config, tiny_mimi_config), tmp_path / "voice", "Tiny")
    rng = np.random.default_rng(0)
    entries = []
    for index in range(8):
        samples = rng.normal(0, 0.1, 6_000 + 2_000 * index).astype(np.float32)
        write_wav(tmp_path / f"clip{index}.wav", samples)
        entries.append({"text": f"Clip {index}.", "audio_path": f"clip{index}.wav", "speaker": 0})
    (tmp_path / "dataset.json").write_text(json.dumps(entries))
    return tmp_path


def command(module: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", module, *flags]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "CSM_STUDIO_CACHE": str(folder / "cache")}


def run(folder: Path, module: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(module, *flags),
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment(folder),
        timeout=120,
    )


COMMON = ("--data-path", "dataset.json", "--model", "voice", "--batch-size", "2")


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in mx.load(str(path)).items()}


@pytest.mark.parametrize("module", [LORA, FULL])
def test_interrupted_and_resumed_equals_uninterrupted(workplace: Path, module: str) -> None:
    flags = (*COMMON, "--epochs", "8", "--log-every", "1", "--learning-rate", "1e-3")
    whole = run(workplace, module, *flags, "--output-dir", "whole")
    assert whole.returncode == 0, whole.stderr

    running = subprocess.Popen(
        command(module, *flags, "--output-dir", "parts"),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=workplace,
        env=environment(workplace),
    )
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("step 3:"):
            running.send_signal(signal.SIGINT)
            break
    output, errors = running.communicate(timeout=120)
    assert running.returncode == 130, errors
    hint = re.search(r"To go on:\n +python (.*)", output)
    assert hint is not None, output

    resumed = run(workplace, *hint.group(1).removeprefix("-m ").split())
    assert resumed.returncode == 0, resumed.stderr
    name = "lora_ckpt_epoch_8.safetensors" if module == LORA else "ckpt_epoch_8.safetensors"
    ours, theirs = (tensors(workplace / part / name) for part in ("parts", "whole"))
    for key, value in theirs.items():
        np.testing.assert_array_equal(value, ours[key], err_msg=key)


def test_full_checkpoint_speaks_without_flags(workplace: Path) -> None:
    done = run(workplace, FULL, *COMMON, "--epochs", "1")
    assert done.returncode == 0, done.stderr
    checkpoint = workplace / "finetune_output/ckpt_epoch_1.safetensors"
    model = load_model(checkpoint)
    audio = generate(model, "Hi.", speaker=0, max_audio_length_ms=320, seed=1)
    assert np.isfinite(np.array(audio)).all()


def test_adapter_finds_its_base_from_another_folder(workplace: Path) -> None:
    done = run(workplace, LORA, *COMMON, "--epochs", "1")
    assert done.returncode == 0, done.stderr
    adapter = workplace / "lora_finetune_output/lora_ckpt_epoch_1.safetensors"
    elsewhere = workplace / "elsewhere"
    elsewhere.mkdir()
    flags = ("--adapter", str(adapter), "-o", "out.wav", "--max-audio-length-ms", "320")
    spoken = run(elsewhere, "csm_studio.generate", "Hi.", *flags)
    assert spoken.returncode == 0, spoken.stderr


def test_resumed_run_goes_on_in_its_own_folder(workplace: Path) -> None:
    flags = (*COMMON, "--output-dir", "mine")
    assert run(workplace, LORA, *flags, "--epochs", "1").returncode == 0
    again = run(workplace, LORA, *COMMON, "--epochs", "2", "--resume-from", "mine")
    assert again.returncode == 0, again.stderr
    assert (workplace / "mine/lora_ckpt_epoch_2.safetensors").exists()
    assert not (workplace / "lora_finetune_output").exists()
    done = run(workplace, LORA, *COMMON, "--epochs", "2", "--resume-from", "mine")
    assert done.returncode == 2
    assert "Raise --epochs" in done.stderr
    assert json.loads((workplace / "mine/run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data-path", "gone.json"], "gone.json"),
        (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["--val-split", "1.5"], "--val-split is 1.5; it must be at most 0.9"),
        (["--model", "nowhere"], "nowhere"),
        (["--target-modules", "attn", "ears"], "names ears"),
        (["--train-embeddings", "--target-modules", "text_embeddings"], "Choose one"),
        (["--resume-from", "gone"], "gone: not found"),
        (["--pretrained-path", "gone.safetensors"], "gone.safetensors: not found"),
        (["--pretrained-path", "voice/mimi.safetensors"], "no CSM weights in it"),
    ],
)
def test_wrong_input_is_one_message(workplace: Path, flags: list[str], words: str) -> None:
    done = run(workplace, LORA, *COMMON, *flags)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workplace / "lora_finetune_output").exists()
