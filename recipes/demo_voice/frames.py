"""The corpus as the language model sees it: codes, laid out in frames of text and audio."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import MimiModel

from codec_model import QuantizerTrainer, codec_config, encode_latents, round_as_shipped
from common import (
    SAMPLES_PER_FRAME,
    Clip,
    clip_samples,
    load_checkpoint,
    open_audio,
    pick_device,
    read_clips,
)
from csm_model import NUM_CODEBOOKS
from text import build_tokenizer, prompt_ids

VARIANT_SHIFT = 720  # samples; multiples fall at 0, 30, 60, 10, 40, ... ms of the 80 ms frame


@torch.no_grad()
def encode_corpus(work_dir: Path, variants: int = 1) -> None:
    """Write `codes.npz`: (T, K) int16 for each clip with a text, and the codec step they are of.

    Variant v of a training clip, named `clip#v`, starts a fraction of a frame later: the same
    speech in other codes, so that the language model learns them by heart less soon. Codes that
    are there already, of the same codec step, are kept.
    """
    device = pick_device()
    checkpoint = load_checkpoint(work_dir / "codec" / "joint.pt", device)
    model = MimiModel(codec_config()).to(device).eval()
    model.load_state_dict(checkpoint["model"])
    round_as_shipped(model)
    quantizer, audio = QuantizerTrainer(model), open_audio(work_dir)
    everything = torch.tensor([NUM_CODEBOOKS - 1], device=device)
    path, codes = work_dir / "codes.npz", {}
    if path.exists():
        codes = dict(np.load(path))
        if int(codes.pop("codec_step")) != checkpoint["step"]:
            codes = {}
    for clip in read_clips(work_dir):
        if clip.speaker < 0:
            continue
        for variant in range(variants if clip.split == "train" else 1):
            name = f"{clip.name}#{variant}" if variant else clip.name
            if name in codes:
                continue
            samples = clip_samples(audio, clip)[variant * VARIANT_SHIFT % SAMPLES_PER_FRAME :]
            latents = encode_latents(model, torch.from_numpy(samples).to(device)[None])  # float32
            found = quantizer(latents, everything).codes.T
            assert len(found) == -(-len(samples) // SAMPLES_PER_FRAME)
            codes[name] = found.cpu().numpy().astype(np.int16)
    temporary = work_dir / "codes.tmp.npz"
    np.savez(temporary, codec_step=checkpoint["step"], **codes)
    temporary.replace(path)
    frames = sum(len(value) for value in codes.values())
    print(f"{len(codes)} recordings, {frames} frames, codec step {checkpoint['step']}")


def sequence(turns: list[tuple[list[int], np.ndarray]]) -> np.ndarray:
    """Lay turns out as frames: text, audio, one all-zero frame, and so on.

    Args:
        turns: (text ids, codes (T, K)) of each turn.

    Returns:
        (P, K + 1) int64, -1 in the columns a position does not have.
    """
    rows = []
    for ids, codes in turns:
        text = np.full((len(ids), NUM_CODEBOOKS + 1), -1, np.int64)
        text[:, -1] = ids
        audio = np.full((len(codes) + 1, NUM_CODEBOOKS + 1), -1, np.int64)
        audio[:-1, :-1] = codes
        audio[-1, :-1] = 0  # the end
        rows += [text, audio]
    return np.concatenate(rows)


def collate(sequences: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Pad sequences on the right to tokens (B, P, K + 1) int64 and their mask, bool."""
    longest = max(len(item) for item in sequences)
    padded = np.full((len(sequences), longest, NUM_CODEBOOKS + 1), -1, np.int64)
    for row, item in zip(padded, sequences, strict=True):
        row[: len(item)] = item
    tokens = torch.from_numpy(padded)
    return tokens.clamp(min=0), tokens >= 0


class Corpus:
    """The clips as sequences, in batches of similar length."""

    def __init__(
        self, work_dir: Path, batch_positions: int, joined_share: float, seed: int
    ) -> None:
        self.batch_positions, self.joined_share, self.seed = batch_positions, joined_share, seed
        self.codes = dict(np.load(work_dir / "codes.npz"))
        self.tokenizer = build_tokenizer()
        clips = [clip for clip in read_clips(work_dir) if clip.name in self.codes]
        self.train = [clip for clip in clips if clip.split == "train"]
        self.held_out = [clip for clip in clips if clip.split == "held_out"]
        self.variants = max(
            [int(name.rpartition("#")[2]) for name in self.codes if "#" in name] + [0]
        )

    def turn(self, clip: Clip, variant: int = 0) -> tuple[list[int], np.ndarray]:
        """Return the text ids and the codes of one clip."""
        codes = self.codes[f"{clip.name}#{variant}" if variant else clip.name]
        return prompt_ids(self.tokenizer, clip.speaker, clip.text), codes

    def epoch(self, number: int) -> list[list[np.ndarray]]:
        """Return the batches of one epoch; the number alone decides the order and the joins."""
        rng = np.random.default_rng([self.seed, number])
        order = [self.train[i] for i in rng.permutation(len(self.train))]
        queues: dict[int, list[Clip]] = {}
        for clip in order:
            queues.setdefault(clip.speaker, []).append(clip)
        sequences = []
        for queue in queues.values():
            while queue:
                joined = rng.random() < self.joined_share
                count = int(rng.integers(2, 4)) if joined else 1
                variants = rng.integers(0, self.variants + 1, count)
                turns = [self.turn(c, int(v)) for c, v in zip(queue, variants, strict=False)]
                sequences.append(sequence(turns))
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
