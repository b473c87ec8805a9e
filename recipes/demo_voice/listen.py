"""Hear and measure the exported voice.

    python recipes/demo_voice/listen.py --work-dir W --export W/export [--whisper tiny.en]

Writes `listen/` under the work directory: held-out recordings through the codec, and the same
sentences spoken by the language model. With `--whisper`, prints word error rates of the originals,
of the reconstructions and of the generations.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file
from scipy.signal import resample_poly
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CsmConfig, MimiModel

from common import SAMPLE_RATE_HZ, Clip, clip_samples, open_audio, read_clips
from csm_model import Csm
from frames import collate, sequence
from text import prompt_ids


def load_language_model(folder: Path) -> Csm:
    """Read an exported language model."""
    model = Csm(CsmConfig(**json.loads((folder / "config.json").read_text())))
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in tensors.items()})
    return model.eval()


def draw(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    """Sample from the `top_k` likeliest entries, (1, V) -> (1, 1)."""
    values, places = logits.topk(top_k)
    return places.gather(1, torch.multinomial((values / temperature).softmax(-1), 1))


@torch.inference_mode()
def generate(
    model: Csm, ids: list[int], max_frames: int, temperature: float = 0.7, top_k: int = 30
) -> np.ndarray:
    """Return the codes the model gives for a prompt, (T, K) int64, the end frame excluded."""
    frames = np.zeros((0, model.num_codebooks), np.int64)
    while len(frames) < max_frames:
        tokens, mask = collate([sequence([(ids, frames)])[:-1]])  # without the end frame
        hidden = model.hidden_states(tokens, mask)[:, -1]
        codes = draw(model.lm_head(hidden), temperature, top_k)
        while codes.shape[1] < model.num_codebooks:
            logits = model.depth_logits(hidden, codes)[:, -1]
            codes = torch.cat([codes, draw(logits, temperature, top_k)], dim=1)
        if not codes.any():
            break
        frames = np.concatenate([frames, codes.clamp(max=511).numpy()])
    return frames


@torch.inference_mode()
def decode(codec: MimiModel, codes: np.ndarray) -> np.ndarray:
    """Return the waveform of codes (T, K), float32 (S,)."""
    return codec.decode(torch.from_numpy(codes.T[None].copy())).audio_values[0, 0].numpy()


class Recogniser:
    """Word errors by an offline recogniser."""

    def __init__(self, name: str) -> None:
        from faster_whisper import WhisperModel
        from whisper_normalizer.english import EnglishTextNormalizer

        self.model = WhisperModel(name, compute_type="default", cpu_threads=1)
        self.normalise = EnglishTextNormalizer()
        self.totals: dict[str, list[int]] = {}

    def hear(self, kind: str, waveform: np.ndarray, text: str) -> None:
        """Transcribe a waveform and count its word errors under `kind`."""
        samples = resample_poly(waveform, 2, 3).astype(np.float32)
        segments, _ = self.model.transcribe(samples, language="en", beam_size=1)
        heard = self.normalise(" ".join(s.text for s in segments)).split()
        wanted = self.normalise(text).split()
        row = list(range(len(heard) + 1))
        for i, word in enumerate(wanted, start=1):
            diagonal, row[0] = row[0], i
            for j, other in enumerate(heard, start=1):
                cost = min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
                diagonal, row[j] = row[j], cost
        errors, words = self.totals.setdefault(kind, [0, 0])
        self.totals[kind] = [errors + row[-1], words + len(wanted)]
        print(f"{kind:14} {row[-1]:2}/{len(wanted):2}  {' '.join(heard)}", flush=True)


def listen(
    work_dir: Path, export: Path, whisper: str | None, clips: list[Clip], num_spoken: int
) -> None:
    """Write and measure reconstructions of clips, and generations of the first `num_spoken`."""
    codec = MimiModel.from_pretrained(export / "codec", dtype=torch.float32).eval()
    model = load_language_model(export / "language_model")
    tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    recogniser = Recogniser(whisper) if whisper else None
    audio, folder = open_audio(work_dir), work_dir / "listen"
    folder.mkdir(exist_ok=True)
    for number, clip in enumerate(clips):
        torch.manual_seed(number)
        original = clip_samples(audio, clip)
        with torch.inference_mode():
            codes = codec.encode(torch.from_numpy(original)[None, None]).audio_codes[0].T.numpy()
        spoken = codes[:0]
        if number < num_spoken:
            ids = prompt_ids(tokenizer, clip.speaker, clip.text)
            spoken = generate(model, ids, max_frames=2 * len(codes))
            print(f"{clip.name}: {len(codes)} frames recorded, {len(spoken)} generated", flush=True)
        waveforms = {"original": original, "reconstruction": decode(codec, codes)}
        if len(spoken):
            waveforms["generation"] = decode(codec, spoken)
        for kind, waveform in waveforms.items():
            soundfile.write(folder / f"{number:02}_{kind}.wav", waveform, SAMPLE_RATE_HZ)
            if recogniser:
                recogniser.hear(kind, waveform, clip.text)
    if recogniser:
        for kind, (errors, words) in recogniser.totals.items():
            print(f"{kind}: word error rate {errors / words:.3f} ({words} words)")


def main() -> None:
    """Read the options and listen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--export", type=Path, required=True)
    parser.add_argument("--whisper", help="a faster-whisper model or its folder")
    parser.add_argument("--clips", type=int, default=40, help="held-out clips to use")
    parser.add_argument("--generations", type=int, default=12, help="of them, how many to speak")
    arguments = parser.parse_args()
    clips = read_clips(arguments.work_dir, "held_out")
    clips = random.Random(0).sample(clips, min(arguments.clips, len(clips)))  # mixed speakers
    listen(arguments.work_dir, arguments.export, arguments.whisper, clips, arguments.generations)


if __name__ == "__main__":
    main()
