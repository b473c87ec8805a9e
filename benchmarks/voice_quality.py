"""How good the demo voice is: `python benchmarks/voice_quality.py [--adapter FILE]`.

On forty held-out sentences (`held_out/`) it measures, offline, what is said and how: the recordings
themselves, the codec's reconstruction of them (the ceiling of any voice on this codec), the demo
voice per speaker, the sample voice and its reconstruction, and with --adapter the voice after LoRA
on the sample voice. See requirements.txt for the judges.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from judges import OpinionScore, SpeakerVectors, WordErrors, silence_share, unit  # noqa: E402

from csm_studio.audio.io import read_audio  # noqa: E402
from csm_studio.constants import SAMPLES_PER_FRAME  # noqa: E402
from csm_studio.dataset.importers import find_clips  # noqa: E402
from csm_studio.dataset.records import Clip  # noqa: E402
from csm_studio.errors import GenerationError  # noqa: E402
from csm_studio.generation.generator import generate_speech  # noqa: E402
from csm_studio.model_folder import load_model  # noqa: E402
from csm_studio.models.csm import CSM  # noqa: E402

SAMPLE_VOICE = "sample voice"


@dataclasses.dataclass
class Utterance:
    """One piece of speech to judge.

    Attributes:
        audio: Float32 (S,) at 24 kHz; empty where nothing was generated.
        text: What it should say.
        voice: Whose voice it should be.
        ended: Whether the model ended it; None for recordings.
    """

    audio: np.ndarray
    text: str
    voice: str
    ended: bool | None = None


class Jury:
    """All judges, and the speakers that a voice is compared with."""

    def __init__(self, speakers: dict[str, list[np.ndarray]]) -> None:
        self._words, self._opinion = WordErrors(), OpinionScore()
        self._vectors = SpeakerVectors()
        self._means = {
            name: unit(np.mean([self._vectors.embed(audio) for audio in clips], axis=0))
            for name, clips in speakers.items()
        }

    def judge(self, what: str, utterances: Iterable[Utterance]) -> None:
        """Print one line of the table."""
        wrong = meant = 0
        similar, nearest, opinions, silences, ended = [], [], [], [], []
        for utterance in utterances:
            if utterance.ended is not None:
                ended.append(utterance.ended)
            if utterance.audio.size < SAMPLES_PER_FRAME:
                meant += len(utterance.text.split())
                wrong += len(utterance.text.split())
                nearest.append(False)
                continue
            errors, words = self._words.count(utterance.audio, utterance.text)
            wrong, meant = wrong + errors, meant + words
            vector = self._vectors.embed(utterance.audio)
            scores = {name: float(vector @ mean) for name, mean in self._means.items()}
            similar.append(scores[utterance.voice])
            nearest.append(max(scores, key=lambda name: scores[name]) == utterance.voice)
            opinions.append(self._opinion.score(utterance.audio))
            silences.append(silence_share(utterance.audio))
        endings = f"{np.mean(ended):7.0%}" if ended else "      -"
        print(
            f"{what:34s}{wrong / meant:7.1%}{np.mean(similar):9.2f}{np.mean(nearest):9.0%}"
            f"{np.mean(opinions):7.2f}{endings}{np.mean(silences):9.0%}{len(nearest):5d}",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--adapter", type=Path, help="LoRA adapter trained on the sample voice")
    parser.add_argument("--adapter-speaker", type=int, default=0)
    parser.add_argument("--clips", type=int, default=10, help="sentences per voice")
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--top-k", type=int, default=50)
    options = parser.parse_args()
    sampling = {"temperature": options.temperature, "top_k": options.top_k}

    held_out = find_clips(ROOT / "benchmarks/held_out").clips
    voices: dict[str, list[Clip]] = {}
    for clip in held_out:
        voices.setdefault(f"speaker {clip.speaker_id}", []).append(clip)
    sample = [
        clip
        for clip in find_clips(ROOT / "assets/sample_voice").clips
        if clip.audio_path.name.startswith("allison")
    ]
    voices[SAMPLE_VOICE] = sample[:: max(1, len(sample) // options.clips)]
    voices = {name: clips[: options.clips] for name, clips in voices.items()}
    recorded = {
        name: [Utterance(read_audio(c.audio_path), c.text, name) for c in clips]
        for name, clips in voices.items()
    }
    jury = Jury({name: [one.audio for one in ones] for name, ones in recorded.items()})
    model = load_model(options.model)
    print(
        f"{'':34s}{'words':>7s}{'own':>9s}{'nearest':>9s}{'':>7s}{'ends':>7s}\n"
        f"{'':34s}{'wrong':>7s}{'speaker':>9s}{'is own':>9s}{'MOS':>7s}{'itself':>7s}"
        f"{'silence':>9s}{'n':>5s}"
    )
    named = [one for name, ones in recorded.items() if name != SAMPLE_VOICE for one in ones]
    jury.judge("recordings", named)
    jury.judge("recordings through the codec", reconstruct(model, named))
    jury.judge("sample voice", recorded[SAMPLE_VOICE])
    jury.judge("sample voice through the codec", reconstruct(model, recorded[SAMPLE_VOICE]))
    for number, name in enumerate(sorted(set(voices) - {SAMPLE_VOICE})):
        texts = [clip.text for clip in voices[name]]
        jury.judge(f"demo voice, {name}", speak(model, texts, number, name, sampling))
    if options.adapter:
        adapted = load_model(options.model, options.adapter)
        texts = [clip.text for clip in held_out[:: max(1, len(held_out) // options.clips)]]
        spoken = speak(
            adapted, texts[: options.clips], options.adapter_speaker, SAMPLE_VOICE, sampling
        )
        jury.judge("after LoRA on the sample voice", spoken)


def reconstruct(model: CSM, utterances: Sequence[Utterance]) -> Iterable[Utterance]:
    """Yield each utterance after encoding and decoding."""
    assert model.companions is not None
    codec = model.companions.codec
    for utterance in utterances:
        decoded = codec.decode(codec.encode(mx.array(utterance.audio)[None]))[0]
        audio = np.array(decoded)[: utterance.audio.size]
        yield dataclasses.replace(utterance, audio=audio)


def speak(
    model: CSM, texts: Sequence[str], speaker: int, voice: str, sampling: dict[str, float]
) -> Iterable[Utterance]:
    """Yield each text as the model speaks it, with the text's number as the seed."""
    for seed, text in enumerate(texts):
        try:
            speech = generate_speech(model, text, speaker, (), 20_000, seed=seed, **sampling)
        except GenerationError:
            yield Utterance(np.zeros(0, np.float32), text, voice, True)
        else:
            yield Utterance(speech.audio, text, voice, speech.ended_by_itself)


if __name__ == "__main__":
    main()
