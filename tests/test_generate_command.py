"""`python -m csm_studio.generate`, the example, and the public face in fresh processes."""

from __future__ import annotations

import ast
import io
import os
import runpy
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from csm_studio.audio.io import read_audio
from csm_studio.command import download_line
from csm_studio.configs import CSMConfig, MimiConfig
from csm_studio.errors import CsmStudioError
from csm_studio.generation.generator import generate
from csm_studio.model_folder import load_model, save_model_folder
from csm_studio.models.adapters import save_lora_weights
from csm_studio.models.lora import apply_lora_to_model
from tests.tiny_voice import make_voice

ROOT = Path(__file__).parents[1]
SHORT = ["--max-audio-length-ms", "320"]


@pytest.fixture
def folder(
    tiny_csm_config: CSMConfig,
    tiny_mimi_config: MimiConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    monkeypatch.chdir(tmp_path)
    save_model_folder(make_voice(tiny_csm_config, tiny_mimi_config), Path("voice"), "Tiny")
    return "voice"


@pytest.fixture(scope="module")
def command() -> Callable[[list[str]], None]:
    # Run, not imported: an import would hide the function csm_studio.generate.
    main: Callable[[list[str]], None] = runpy.run_module("csm_studio.generate")["main"]
    return main


def samples(path: str) -> np.ndarray:
    return read_audio(path)


def test_writes_the_speech_and_reports(
    command: Callable[[list[str]], None], folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command(["Hello.", "-o", "new/out.wav", "--model", folder, "--seed", "3", *SHORT])
    expected = generate(load_model(folder), "Hello.", 0, max_audio_length_ms=320, seed=3)
    np.testing.assert_allclose(samples("new/out.wav"), np.clip(expected, -1, 1), atol=1e-4)
    with wave.open("new/out.wav") as stream:
        assert (stream.getframerate(), stream.getnchannels()) == (24_000, 1)
    output = capsys.readouterr().out
    for part in ("Wrote new/out.wav: 0.32 s", "real-time factor", "seed 3", "limit of 320 ms"):
        assert part in output


def test_settings_reach_the_generator(command: Callable[[list[str]], None], folder: str) -> None:
    settings: dict[str, Any] = {"temperature": 0.5, "top_k": 9, "top_p": 0.7, "min_p": 0.1}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    flags = [flag.replace("_", "-") for flag in flags]
    common = ["--model", folder, "--seed", "1", "--speaker", "2", *SHORT]
    command(["Hello.", "-o", "a.wav", *flags, *common])
    expected = generate(
        load_model(folder), "Hello.", 2, max_audio_length_ms=320, seed=1, **settings
    )
    np.testing.assert_allclose(samples("a.wav"), np.clip(expected, -1, 1), atol=1e-4)


def test_text_from_standard_input(
    command: Callable[[list[str]], None], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello.\n"))
    common = ["--model", folder, "--seed", "1", *SHORT]
    command(["-", "-o", "piped.wav", *common])
    command(["Hello.", "-o", "typed.wav", *common])
    assert Path("piped.wav").read_bytes() == Path("typed.wav").read_bytes()


def test_context_in_lists_or_repeated(command: Callable[[list[str]], None], folder: str) -> None:
    common = ["--model", folder, "--seed", "1", *SHORT]
    command(["One.", "-o", "one.wav", *common])
    command(["Two.", "-o", "two.wav", *common])
    listed = ["--context-audio", "one.wav", "two.wav", "--context-text", "One.", "Two."]
    listed += ["--context-speaker", "0", "1"]
    repeated = ["--context-audio", "one.wav", "--context-text", "One.", "--context-speaker", "0"]
    repeated += ["--context-audio", "two.wav", "--context-text", "Two.", "--context-speaker", "1"]
    command(["Hello.", "-o", "a.wav", *common, *listed])
    command(["Hello.", "-o", "b.wav", *common, *repeated])
    command(["Hello.", "-o", "c.wav", *common])
    assert Path("a.wav").read_bytes() == Path("b.wav").read_bytes() != Path("c.wav").read_bytes()


def test_adapter_brings_its_base(command: Callable[[list[str]], None], folder: str) -> None:
    model = load_model(folder)
    apply_lora_to_model(model, rank=2)
    model.projection.lora_b = mx.ones_like(model.projection.lora_b)
    save_lora_weights(model, "lora.safetensors", {"base_model": folder})
    common = ["--seed", "1", *SHORT]
    command(["Hello.", "-o", "a.wav", "--adapter", "lora.safetensors", *common])
    command(["Hello.", "-o", "b.wav", "--adapter", "lora.safetensors", "--model", folder, *common])
    command(["Hello.", "-o", "c.wav", "--model", folder, *common])
    assert Path("a.wav").read_bytes() == Path("b.wav").read_bytes() != Path("c.wav").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["Hello.", "-o", "out.mp3"], "only .wav files are written"),
        (["Hello.", "-o", "folder.wav"], "is a folder"),
        ([" ", "-o", "out.wav"], "text is empty"),
        (["Hello.", "-o", "out.wav", "--top-p", "2"], "--top-p is 2"),
        (["Hello.", "-o", "out.wav", "--max-audio-length-ms", "1"], "at least 80"),
        (["Hello.", "-o", "out.wav", "--context-audio", "a.wav"], "1 --context-audio, 0 --context"),
        (["Hello.", "-o", "out.wav", "--model", "nowhere"], "nowhere: no such model"),
        (["Hello.", "-o", "out.wav", "--adapter", "gone.safetensors"], "gone.safetensors"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    command: Callable[[list[str]], None], folder: str, arguments: list[str], expected: str
) -> None:
    Path("folder.wav").mkdir()
    with pytest.raises(CsmStudioError, match=expected):
        command(arguments)
    assert not Path("out.wav").exists()


def test_download_line_is_for_terminals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with download_line() as show:
        show(5_000_000, 10_000_000, "a.bin")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with download_line() as show:
        show(5_000_000, 10_000_000, "a.bin")
        show(7_000_000, None, "b.bin")
    lines = capsys.readouterr().err.split("\r")
    assert lines[1] == "downloading a.bin: 5 of 10 MB (50%)"
    # Longer text of before is overwritten.
    assert lines[2].rstrip("\n") == "downloading b.bin: 7 MB".ljust(len(lines[1]))


# --- fresh processes --------------------------------------------------------------------------


def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=check
    )


def test_help_and_import_need_no_mlx() -> None:
    code = "import sys, csm_studio; csm_studio.__version__; assert not any('mlx' in m for m in "
    run("-c", code + "sys.modules)")
    code = (
        "import sys, runpy\nsys.argv = ['generate', '--help']\ntry:\n"
        "    runpy.run_module('csm_studio.generate', run_name='__main__')\n"
        "except SystemExit:\n    pass\nassert not any('mlx' in m for m in sys.modules)"
    )
    assert "--context-audio" in run("-c", code).stdout


def test_error_is_one_message_and_status_2(folder: str) -> None:
    done = run("-m", "csm_studio.generate", "Hi.", "-o", "x.txt", "--model", folder, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: x.txt: only .wav")
    assert "Traceback" not in done.stderr


def test_example(folder: str) -> None:
    model = load_model(folder)
    apply_lora_to_model(model, rank=2)
    save_lora_weights(model, "lora.safetensors", {"base_model": folder})
    example = ROOT / "examples" / "example_finetuned_lora.py"
    done = run(str(example), "lora.safetensors", "Your custom text here", "0")
    assert done.stdout.startswith("Wrote finetuned_output.wav")
    assert samples("finetuned_output.wav").size == 62 * 1920


def test_command_module_is_never_imported() -> None:
    # `import csm_studio.generate` would put the module in place of the public function.
    for path in [*ROOT.glob("csm_studio/**/*.py"), *ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert all(alias.name != "csm_studio.generate" for alias in node.names), path
            elif isinstance(node, ast.ImportFrom):
                assert node.module != "csm_studio.generate", path
