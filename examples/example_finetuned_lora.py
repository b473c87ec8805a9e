"""Speak with a LoRA-finetuned voice, from Python.

python examples/example_finetuned_lora.py ADAPTER "Your text here" SPEAKER
"""

import sys
from pathlib import Path

import audiofile
import numpy as np

# The repository need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from csm_studio import generate, load_model
from csm_studio.checkpoints.weights import read_description
from csm_studio.finetune.lora import load_lora_weights

OUTPUT = "finetuned_output.wav"


def main() -> None:
    """Generate one utterance."""
    if len(sys.argv) != 4:
        raise SystemExit(f'usage: python {sys.argv[0]} ADAPTER "text" SPEAKER')
    adapter, text, speaker = sys.argv[1], sys.argv[2], int(sys.argv[3])

    # The adapter names the model it was trained on, and its rank, alpha and target modules.
    model = load_model(read_description(adapter)["base_model"])
    model = load_lora_weights(model, adapter)

    audio = generate(model, text=text, speaker=speaker, context=[], max_audio_length_ms=5000)

    audiofile.write(OUTPUT, np.asarray(audio), 24000)
    print(f"Wrote {OUTPUT}: {audio.size / 24000:.2f} s")


if __name__ == "__main__":
    main()
