"""Training crops of the codec: random, augmented, and a function of the step number alone."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import SAMPLES_PER_FRAME, open_audio, read_clips

FEATURE_HOP = 480  # samples per recogniser frame of 20 ms


@dataclass(frozen=True)
class CropSettings:
    """What crops are drawn."""

    batch_frames: int = 64  # per process and step: 4 crops of 16 frames
    crop_frames: tuple[int, ...] = (16, 16, 16, 36)  # the long crops reach past the 64-key window
    resample_share: float = 0.25  # of the crops change speed, pitch and formants together
    gain_db: tuple[float, float] = (-12.0, 4.0)
    feature_width: int = 384  # of Whisper tiny
    seed: int = 1


class CropSampler:
    """Draws augmented crops; the step number alone decides which, so a resumed run sees the same.

    Args:
        settings: see `CropSettings`.
        work_dir: where `audio.i16` and, if there are any, `features.f16` are.
        rank: number of this process.
    """

    def __init__(self, settings: CropSettings, work_dir: Path, rank: int) -> None:
        self.settings, self.rank = settings, rank
        self.audio = open_audio(work_dir)
        self.clips = read_clips(work_dir, "train")
        self.starts = np.array([clip.start for clip in self.clips])
        self.lengths = np.array([clip.length for clip in self.clips])
        self.shares = self.lengths / self.lengths.sum()
        self.features = None
        if (work_dir / "features.f16").exists():
            flat = np.memmap(work_dir / "features.f16", dtype=np.float16, mode="r")
            self.features = flat.reshape(-1, settings.feature_width)

    def batch(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Return waveforms (B, S) float32 and recogniser features (B, T, width), or None."""
        rng = np.random.default_rng([self.settings.seed, step, self.rank])
        common_rng = np.random.default_rng([self.settings.seed, step])  # the same on every rank
        num_frames = int(common_rng.choice(self.settings.crop_frames))
        num_items = max(1, round(self.settings.batch_frames / num_frames))
        items = [self._crop(rng, num_frames) for _ in range(num_items)]
        waveforms = torch.from_numpy(np.stack([waveform for waveform, _ in items]))
        if self.features is None:
            return waveforms, None
        return waveforms, torch.from_numpy(np.stack([features for _, features in items]))

    def _crop(self, rng: np.random.Generator, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
        size = num_frames * SAMPLES_PER_FRAME
        speed = 1.0
        if rng.random() < self.settings.resample_share:
            speed = float(np.exp(rng.uniform(-0.22, 0.22)))  # 0.8 to 1.25: pitch, formants, rate
        span = int(np.ceil(size * speed)) + 2
        number = int(rng.choice(len(self.clips), p=self.shares))
        start, length = int(self.starts[number]), int(self.lengths[number])
        begin = start + int(rng.integers(0, max(1, length - span + 1)))
        source = np.zeros(span, np.float32)
        available = self.audio[begin : min(begin + span, start + length)]
        source[: len(available)] = available
        if speed != 1.0:
            source = np.interp(np.arange(size) * speed, np.arange(span), source)
        gain = 10.0 ** (rng.uniform(*self.settings.gain_db) / 20.0) / 32768.0
        waveform = np.clip(source[:size] * gain, -1.0, 1.0).astype(np.float32)
        if self.features is None:
            return waveform, waveform
        centres = begin + (np.arange(num_frames * 4) + 0.5) * FEATURE_HOP * speed
        rows = np.minimum((centres / FEATURE_HOP).astype(np.int64), len(self.features) - 1)
        taps = self.features[rows].astype(np.float32)
        return waveform, taps.reshape(num_frames, 4, -1).mean(1)
