"""The README's quick start: its commands are those of the example, and the loop runs."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from csm_studio.audio.io import read_audio
from csm_studio.model_folder import load_model
from examples import quickstart

ROOT = Path(__file__).parent.parent


def transcript() -> str:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return readme.split("<!-- quick start -->")[1].split("<!-- end -->")[0]


def test_transcript_shows_the_commands_that_the_example_runs() -> None:
    shown = [
        shlex.split(line.removeprefix("$ python "))
        for line in transcript().replace("\\\n", " ").splitlines()
        if line.startswith("$ python ")
    ]
    options = quickstart.parser().parse_args([])
    assert shown == quickstart.commands(
        options.audio_dir, options.output_dir, options.text, options.epochs
    )


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the whole loop on a few clips of the sample voice, with one epoch."""
    folder = tmp_path_factory.mktemp("loop")
    clips = folder / "clips"
    clips.mkdir()
    source = ROOT / "assets" / "sample_voice"
    lines = (source / "metadata.csv").read_text(encoding="utf-8").splitlines()
    for line in lines[1:9]:
        name = line.split(",")[0]
        text = line.split(",", 3)[2].strip('"')
        (clips / Path(name).name).write_bytes((source / name).read_bytes())
        (clips / Path(name).with_suffix(".txt").name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples" / "quickstart.py"),
            *("--audio-dir", str(clips), "--output-dir", str(folder / "voice")),
            *("--epochs", "1"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "voice", done.stdout


def test_loop_writes_what_it_says(loop: tuple[Path, str]) -> None:
    folder, output = loop
    assert "Took 8 clips" in output
    assert len(json.loads((folder / "dataset.json").read_text())) == 8
    assert (folder / "lora/lora_ckpt_epoch_1.safetensors").exists()
    speech = read_audio(folder / "hello.wav")
    assert 0.08 * 24_000 <= speech.size <= 10 * 24_000
    merged = load_model(folder / "merged")
    assert merged.companions is not None


def test_example_of_the_documentation_runs(loop: tuple[Path, str]) -> None:
    folder, _ = loop
    adapter = folder / "lora/lora_ckpt_epoch_1.safetensors"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples" / "example_finetuned_lora.py"),
            *(str(adapter), "Your custom text here.", "0"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "finetuned_output.wav").stat().st_size > 1000
