"""Random excerpts for training the codec; the step number alone decides them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from corpus import SAMPLES_PER_FRAME, open_audio, read_clips, shard_paths
from features import BLOCK, FLOOR, HOP, Basis, open_spectra

OUTPUT_LAG = HOP  # samples by which the decoder's output lies behind what it was given
ASR_HOP = 480
ASR_WIDTH = 384  # of Whisper tiny
HUMAN_FACTOR = 2.0  # recorded speech counts more than its hours


@dataclass
class Shard:
    """One shard, mapped into memory."""

    name: str
    audio: np.ndarray
    mel: np.ndarray
    pitch: np.ndarray
    asr: np.ndarray | None
    starts: np.ndarray
    lengths: np.ndarray
    weight: float


@dataclass(frozen=True)
class Batch:
    """Excerpts of one step.

    Attributes:
        wave: what the encoder hears, (B, S) float32.
        target: what the decoder is to say, (B, S): `wave` `OUTPUT_LAG` samples earlier.
        features: see `features.Basis`, (B, S / 960, 256) float32.
        asr: a recogniser's features for each codec frame, (B, S / 1920, width) float32.
        has_asr: (B,) bool.
    """

    wave: Tensor
    target: Tensor
    features: Tensor
    asr: Tensor
    has_asr: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Move all tensors to a device."""
        return Batch(*(value.to(device) for value in vars(self).values()))


def open_shards(work_dir: Path, split: str = "train") -> list[Shard]:
    """Map every shard that has spectra and clips of the split."""
    shards = []
    for path in shard_paths(work_dir):
        clips = read_clips(path, split)
        if not clips or not path.with_suffix(".mel").exists():
            continue
        mel, pitch = open_spectra(path)
        clips = [clip for clip in clips if (clip.start + clip.length) // HOP <= len(mel)]
        asr_path = path.with_suffix(".asr")
        asr = None
        if asr_path.exists():
            asr = np.memmap(asr_path, dtype=np.float16, mode="r").reshape(-1, ASR_WIDTH)
        lengths = np.array([clip.length for clip in clips])
        human = HUMAN_FACTOR if clips[0].speaker < 0 else 1.0
        starts = np.array([clip.start for clip in clips])
        weight = human * lengths.sum()
        shards.append(Shard(path.name, open_audio(path), mel, pitch, asr, starts, lengths, weight))
    return shards


class BatchSampler:
    """Draws batches.

    Args:
        work_dir: see corpus.py.
        num_items: excerpts of a batch of the usual length; a batch of longer ones has fewer.
        num_frames: codec frames of the usual excerpt; every fourth batch has three times as many.
        seed: of the draws.
        most_share: largest share of the draws that one shard gets.
    """

    GAIN_DB = (-12.0, 6.0)

    def __init__(
        self, work_dir: Path, num_items: int, num_frames: int, seed: int, most_share: float = 0.34
    ) -> None:
        self.shards = open_shards(work_dir)
        self.basis = Basis(work_dir)
        self.num_items, self.num_frames, self.seed = num_items, num_frames, seed
        shares = np.array([shard.weight for shard in self.shards])
        shares = np.minimum(shares / shares.sum(), most_share)
        self.shares = shares / shares.sum()

    def batch(self, step: int) -> Batch:
        """Return the batch of one step."""
        rng = np.random.default_rng([self.seed, step])
        long = step % 4 == 3
        num_frames = self.num_frames * 3 if long else self.num_frames
        num_items = max(1, self.num_items // 3) if long else self.num_items
        items = [self._item(rng, num_frames) for _ in range(num_items)]
        return Batch(*(torch.from_numpy(np.stack(part)) for part in zip(*items, strict=True)))

    def _item(self, rng: np.random.Generator, num_frames: int) -> tuple[np.ndarray, ...]:
        shard = self.shards[rng.choice(len(self.shards), p=self.shares)]
        clip = rng.choice(len(shard.starts), p=shard.lengths / shard.lengths.sum())
        size = num_frames * SAMPLES_PER_FRAME
        start, end = shard.starts[clip], shard.starts[clip] + shard.lengths[clip]
        begin = start + HOP * int(rng.integers(0, max(1, (end - start - size) // HOP + 1)))
        samples = np.zeros(size + OUTPUT_LAG, np.float32)  # silence past the clip's end
        first = max(start, begin - OUTPUT_LAG)
        known = shard.audio[first : min(begin + size, end)]
        offset = first - (begin - OUTPUT_LAG)
        samples[offset : offset + len(known)] = known
        gain = 10.0 ** (rng.uniform(*self.GAIN_DB) / 20.0)
        gain = min(gain, 32000.0 / max(1.0, np.abs(samples).max()))
        samples *= np.float32(gain / 32768.0)
        mel = np.full((size // HOP, shard.mel.shape[1]), np.log10(FLOOR), np.float32)
        pitch = np.zeros(size // HOP, np.float32)
        rows = slice(begin // HOP, min(begin + size, end) // HOP)
        known_mel = shard.mel[rows].astype(np.float32) + np.float32(np.log10(gain))
        mel[: len(known_mel)] = np.maximum(known_mel, np.log10(FLOOR))
        pitch[: len(known_mel)] = shard.pitch[rows]
        asr = np.zeros((num_frames, ASR_WIDTH), np.float32)
        wanted = (begin + (np.arange(num_frames * BLOCK) + 0.5) * ASR_HOP).astype(np.int64)
        wanted //= ASR_HOP
        has_asr = shard.asr is not None and wanted[-1] < len(shard.asr)
        if has_asr:
            taps = shard.asr[wanted].astype(np.float32)
            asr = taps.reshape(num_frames, BLOCK, -1).mean(1)
        features = self.basis.features(mel, pitch)
        return samples[OUTPUT_LAG:], samples[:size], features, asr, np.bool_(has_asr)
