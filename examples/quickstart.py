"""The whole loop in one go: recordings -> dataset -> LoRA -> speech -> a merged model folder.

    python examples/quickstart.py
    python examples/quickstart.py --audio-dir RECORDINGS --text "What to say."

Prints each command before it runs it, so that you can run them by hand with changes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = "Hello, this is my own voice."


def commands(audio_dir: str, output_dir: str, text: str, epochs: int) -> list[list[str]]:
    """Return the four commands of the loop, each as its words after `python`."""
    dataset = f"{output_dir}/dataset.json"
    adapter = f"{output_dir}/lora/lora_ckpt_epoch_{epochs}.safetensors"
    train = ["--data-path", dataset, "--output-dir", f"{output_dir}/lora", "--epochs", str(epochs)]
    return [
        [*module("finetune.create_dataset"), "--audio-dir", audio_dir, "--output-json", dataset],
        [*module("finetune.finetune_lora"), *train],
        [*module("generate"), text, "-o", f"{output_dir}/hello.wav", "--adapter", adapter],
        [*module("merge"), "--adapter", adapter, "-o", f"{output_dir}/merged"],
    ]


def module(name: str) -> list[str]:
    """Return the words that run one of the program's commands."""
    return ["-m", f"csm_studio.{name}"]


def parser() -> argparse.ArgumentParser:
    """Return the command line of this example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audio-dir", default="assets/sample_voice")
    parser.add_argument("--output-dir", default="my_voice")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--epochs", type=int, default=10)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the loop, stopping at the first command that fails."""
    options = parser().parse_args(argv)
    # The program runs from anywhere; its default input lies in the repository.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    audio_dir = options.audio_dir
    if not Path(audio_dir).exists() and (ROOT / audio_dir).exists():
        audio_dir = str(ROOT / audio_dir)
    for words in commands(audio_dir, options.output_dir, options.text, options.epochs):
        print(f"\n$ python {shlex.join(words)}", flush=True)
        status = subprocess.run([sys.executable, *words], env=environment, check=False).returncode
        if status:
            raise SystemExit(status)


if __name__ == "__main__":
    main()
