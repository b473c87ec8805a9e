"""Frames of training examples, and batches of them in an order that depends on the seed alone.

Nothing here holds a position: the batches of an epoch are a function of (seed, epoch), so a
resumed run goes on at step s by skipping s batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

# Batches are cut from windows of this many shuffled batches sorted by length: lengths within a
# batch are close, while the order of batches stays random.
_WINDOW_BATCHES = 32


@dataclasses.dataclass(frozen=True)
class Turn:
    """One clip as tokens.

    Attributes:
        text_ids: Ids of `<|begin_of_text|>[speaker]text<|end_of_text|>`.
        codes: Mimi codes, int32 (K, T).
        scored: Whether its audio is a training target, or only context.
    """

    text_ids: Sequence[int]
    codes: np.ndarray
    scored: bool = True

    @property
    def num_frames(self) -> int:
        """Positions taken: text, audio and the end-of-speech frame."""
        return len(self.text_ids) + self.codes.shape[1] + 1

    @property
    def num_targets(self) -> int:
        """Frames that are predicted: audio and the end-of-speech frame, if scored."""
        return self.codes.shape[1] + 1 if self.scored else 0


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation of one or more turns, trained on as one sequence."""

    turns: tuple[Turn, ...]

    @property
    def num_frames(self) -> int:
        """Length of the sequence in positions."""
        return sum(turn.num_frames for turn in self.turns)

    @property
    def num_targets(self) -> int:
        """Frames that are predicted."""
        return sum(turn.num_targets for turn in self.turns)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples padded on the right to one length.

    Attributes:
        tokens: Int32 (B, T, K + 1): K audio codes, then the text token.
        mask: Uint8 (B, T, K + 1): which tokens count.
        targets: Int32 (N, 2): (row, position) of every frame that is predicted; position >= 1.
    """

    tokens: np.ndarray
    mask: np.ndarray
    targets: np.ndarray

    @property
    def num_frames(self) -> int:
        """Positions that are not padding."""
        return int(self.mask.any(axis=-1).sum())


def build_batch(examples: Sequence[Example]) -> Batch:
    """Lay examples out as frames.

    A text frame has its id in the last column; an audio frame has K codes; each turn's audio ends
    with one frame of K zeros, the end of speech. Text is never a target.

    Args:
        examples: At least one, of the same number of codebooks.

    Returns:
        The batch, padded to its longest example.
    """
    num_codebooks = examples[0].turns[0].codes.shape[0]
    shape = (len(examples), max(e.num_frames for e in examples), num_codebooks + 1)
    tokens = np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.uint8)
    targets: list[tuple[int, int]] = []
    for row, example in enumerate(examples):
        at = 0
        for turn in example.turns:
            audio = at + len(turn.text_ids)
            end = audio + turn.codes.shape[1]
            tokens[row, at:audio, num_codebooks] = turn.text_ids
            mask[row, at:audio, num_codebooks] = 1
            tokens[row, audio:end, :num_codebooks] = turn.codes.T
            mask[row, audio : end + 1, :num_codebooks] = 1
            if turn.scored:
                targets.extend((row, position) for position in range(audio, end + 1))
            at = end + 1
    return Batch(tokens, mask, np.array(targets, np.int32).reshape(-1, 2))


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Return the batches of one epoch as lists of example indices.

    Every example occurs once. Lengths within a batch are close, so that little is padding.

    Args:
        lengths: Each example's length.
        batch_size: Examples per batch; the last batch may be smaller.
        seed: The run's seed.
        epoch: Counted from 0.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    sizes = np.asarray(lengths)
    window = batch_size * _WINDOW_BATCHES
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(sizes[part], kind="stable")]
        batches += [part[i : i + batch_size].tolist() for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]
