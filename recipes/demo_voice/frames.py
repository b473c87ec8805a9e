"""The corpus as the language model sees it: codes, laid out in frames of text and audio."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import MimiModel

from codec import assemble
from codec_model import (
    MOST_BOOKS,
    NUM_BOOKS,
    QuantizerTrainer,
    codec_config,
    compress,
    hear,
    initialise,
    round_as_shipped,
)
from common import pick_device
from corpus import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, Clip, open_audio, read_clips, shard_paths
from features import HOP, Basis, open_spectra
from text import build_tokenizer, prompt_ids

NUM_NAMED, NAMED_HOURS, MOST_REPEATS = 4, 1.5, 3  # speakers 0-3 are heard for hours
MOST_SAMPLES = 12 * 24_000  # longer clips are left out: few, and costly in attention


@torch.no_grad()
def encode_corpus(work_dir: Path, heard: bool) -> None:
    """Write SHARD.codes of every shard with texts: (frames, 12) int16, -1 where no clip is.

    Args:
        work_dir: see corpus.py.
        heard: let the encoder hear the recordings, as a user's copy does; else the quantizer is
            given the features themselves, which needs no trained encoder.
    """
    device = pick_device()
    model = MimiModel(codec_config()).to(device).eval()
    initialise(model)
    steps = assemble(model, work_dir / "codec", device)
    round_as_shipped(model)
    quantizer, basis = QuantizerTrainer(model), Basis(work_dir)
    everything = torch.tensor([MOST_BOOKS - 1], device=device)
    for shard in shard_paths(work_dir):
        clips = [clip for clip in read_clips(shard) if clip.speaker >= 0]
        if not clips or not shard.with_suffix(".mel").exists():
            continue
        audio, (mel, pitch) = open_audio(shard), open_spectra(shard)
        codes = np.full((len(audio) // SAMPLES_PER_FRAME, MOST_BOOKS), -1, np.int16)
        for clip in clips:
            span = np.s_[clip.start : clip.start + clip.length]
            rows = np.s_[clip.start // HOP : (clip.start + clip.length) // HOP]
            if rows.stop > len(mel):
                continue
            if heard:
                samples = torch.from_numpy(audio[span] / np.float32(32768))
                features = hear(model, samples.to(device)[None])
            else:
                features = torch.from_numpy(basis.features(mel[rows], pitch[rows]))
                features = features.to(device)[None]
            found = quantizer(compress(model, features), everything).codes.T
            frames = np.s_[span.start // SAMPLES_PER_FRAME : span.stop // SAMPLES_PER_FRAME]
            codes[frames] = found.cpu().numpy()
        temporary = shard.with_suffix(".tmp")
        codes.tofile(temporary)
        temporary.replace(shard.with_suffix(".codes"))
        print(f"{shard.name}: {len(codes)} frames, codec steps {steps}", flush=True)


def sequence(turns: list[tuple[list[int], np.ndarray]]) -> np.ndarray:
    """Lay turns out as frames: text, audio, one all-zero frame, and so on.

    Args:
        turns: (text ids, codes (T, K)) of each turn.

    Returns:
        (P, K + 1) int64, -1 in the columns a position does not have.
    """
    rows = []
    for ids, codes in turns:
        text = np.full((len(ids), NUM_BOOKS + 1), -1, np.int64)
        text[:, -1] = ids
        audio = np.full((len(codes) + 1, NUM_BOOKS + 1), -1, np.int64)
        audio[:-1, :-1] = codes
        audio[-1, :-1] = 0  # the end
        rows += [text, audio]
    return np.concatenate(rows)


def alignment(item: np.ndarray) -> np.ndarray:
    """Return where in the text a position's next frame is likely to be, (P, P) float32.

    Row t is for the frame at t + 1. It is a bell over the text of its turn, around the place that
    an even pace would have reached; rows that predict no audio are zero.
    """
    guide = np.zeros((len(item), len(item)), np.float32)
    is_text = item[:, -1] >= 0
    edges = np.flatnonzero(np.diff(is_text.astype(np.int8))) + 1  # text begins at even ones
    bounds = [0, *edges, len(item)]
    for begin, middle, end in zip(bounds[::2], bounds[1::2], bounds[2::2], strict=False):
        letters, frames = np.arange(middle - begin), np.arange(end - middle)
        expected = frames / max(1, len(frames) - 1) * (len(letters) - 1)
        width = max(5.0, 0.1 * len(letters))
        bell = np.exp(-0.5 * ((letters[None] - expected[:, None]) / width) ** 2)
        guide[middle - 1 : end - 1, begin:middle] = bell
    return guide


def collate(sequences: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad sequences on the right: tokens (B, P, K + 1) int64, mask bool, `alignment` (B, P, P)."""
    longest = max(len(item) for item in sequences)
    padded = np.full((len(sequences), longest, NUM_BOOKS + 1), -1, np.int64)
    guides = np.zeros((len(sequences), longest, longest), np.float32)
    for row, guide, item in zip(padded, guides, sequences, strict=True):
        row[: len(item)] = item
        guide[: len(item), : len(item)] = alignment(item)
    tokens = torch.from_numpy(padded)
    return tokens.clamp(min=0), tokens >= 0, torch.from_numpy(guides)


class Corpus:
    """The clips as sequences, in batches of similar length."""

    def __init__(
        self, work_dir: Path, batch_positions: int, joined_share: float, seed: int
    ) -> None:
        self.batch_positions, self.joined_share, self.seed = batch_positions, joined_share, seed
        self.tokenizer = build_tokenizer()
        self.codes: dict[Path, np.ndarray] = {}
        self.train: list[tuple[Path, Clip]] = []
        self.held_out: list[tuple[Path, Clip]] = []
        for shard in shard_paths(work_dir):
            path = shard.with_suffix(".codes")
            if not path.exists():
                continue
            self.codes[shard] = np.fromfile(path, np.int16).reshape(-1, MOST_BOOKS)
            for clip in read_clips(shard):
                if clip.text and self._frames(shard, clip).size and clip.length <= MOST_SAMPLES:
                    chosen = self.train if clip.split == "train" else self.held_out
                    chosen.append((shard, clip))
        self.hours: dict[int, float] = defaultdict(float)
        for _, clip in self.train:
            self.hours[clip.speaker] += clip.length / SAMPLE_RATE_HZ / 3600.0

    def _frames(self, shard: Path, clip: Clip) -> np.ndarray:
        first = clip.start // SAMPLES_PER_FRAME
        frames = self.codes[shard][first : first + clip.length // SAMPLES_PER_FRAME]
        whole = len(frames) * SAMPLES_PER_FRAME == clip.length and (frames >= 0).all()
        return frames[:, :NUM_BOOKS] if whole else frames[:0]

    def _repeats(self, clip: Clip) -> int:
        """Return how often an epoch has a clip: more often for named speakers with few hours."""
        if clip.speaker >= NUM_NAMED:
            return 1
        return round(min(MOST_REPEATS, max(1.0, NAMED_HOURS / self.hours[clip.speaker])))

    def turn(self, shard: Path, clip: Clip) -> tuple[list[int], np.ndarray]:
        """Return the text ids and the codes of one clip."""
        return prompt_ids(self.tokenizer, clip.speaker, clip.text), self._frames(shard, clip)

    def epoch(self, number: int) -> list[list[np.ndarray]]:
        """Return the batches of one epoch; the number alone decides the order and the joins."""
        rng = np.random.default_rng([self.seed, number])
        queues: dict[int, list[tuple[Path, Clip]]] = {}
        indices = [i for i, (_, clip) in enumerate(self.train) for _ in range(self._repeats(clip))]
        for index in rng.permutation(indices):
            shard, clip = self.train[index]
            queues.setdefault(clip.speaker, []).append((shard, clip))
        sequences = []
        for queue in queues.values():
            while queue:
                joined = rng.random() < self.joined_share
                count = int(rng.integers(2, 4)) if joined else 1
                sequences.append(sequence([self.turn(*pair) for pair in queue[:count]]))
                del queue[:count]
        sequences.sort(key=lambda item: len(item) + rng.random())
        batches, batch = [], []
        for item in sequences:  # ascending, so the newest is the longest
            if batch and len(item) * (len(batch) + 1) > self.batch_positions:
                batches.append(batch)
                batch = []
            batch.append(item)
        batches.append(batch)
        return [batches[i] for i in rng.permutation(len(batches))]
