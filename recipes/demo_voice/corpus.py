"""The recordings on disk: shards of clips, and what is computed from them.

A work directory holds, for every shard::

    shards/NAME.i16      clips back to back, int16, 24 kHz mono, each of whole frames (80 ms)
    shards/NAME.jsonl    one line per clip: name, speaker, text, start, length, split
    shards/NAME.mel      log-mel spectra, float16, (100 per second, 80)   (see features.py)
    shards/NAME.f0       pitch in Hz, 0 where unvoiced, float16, (100 per second,)
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SAMPLE_RATE_HZ = 24_000
SAMPLES_PER_FRAME = 1_920  # 80 ms, 12.5 frames per second
HELD_OUT_TABLE = Path(__file__).resolve().parents[2] / "benchmarks/held_out/metadata.csv"


@dataclass(frozen=True)
class Clip:
    """One recording inside a shard.

    Attributes:
        name: path of the recording in its source, or SHARD/NUMBER of a synthetic one.
        speaker: 0-3 for the named voices, more for others the language model hears, negative for
            those only the codec hears.
        text: transcript, empty where the codec alone uses the clip.
        start: first sample in the shard.
        length: number of samples, of whole frames.
        split: "train" or "held_out".
    """

    name: str
    speaker: int
    text: str
    start: int
    length: int
    split: str


def sentence_key(text: str) -> str:
    """Return the letters of a sentence: two sentences of one key are the same to a listener."""
    return re.sub(r"[^a-z]", "", text.lower())


def held_out_keys() -> set[str]:
    """Return the keys of the sentences that the figures are measured on."""
    with HELD_OUT_TABLE.open(encoding="utf-8", newline="") as lines:
        return {sentence_key(row["text"]) for row in csv.DictReader(lines)}


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Round float samples in [-1, 1] to int16."""
    return np.clip(np.round(samples * 32767.0), -32768, 32767).astype(np.int16)


def shard_paths(work_dir: Path) -> list[Path]:
    """Return the shards' paths without ending, in alphabetical order."""
    return sorted(path.with_suffix("") for path in (work_dir / "shards").glob("*.jsonl"))


def read_rows(shard: Path) -> list[dict]:
    """Return the rows of one shard's index; none where there is no such file."""
    path = shard.with_suffix(".jsonl")
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_clips(shard: Path, split: str | None = None) -> list[Clip]:
    """Return the clips of one shard, those of one split or all."""
    clips = [Clip(**row) for row in read_rows(shard)]
    return [clip for clip in clips if split in (None, clip.split)]


def write_shard(shard: Path, recordings: Iterable[tuple[dict, np.ndarray]]) -> Iterator[float]:
    """Append recordings to a shard, yielding the hours it holds after each.

    A line of the index follows its samples, so that a stopped run can be gone on with.

    Args:
        shard: path without ending.
        recordings: (name, speaker, text and split; int16 samples) of each.
    """
    shard.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(shard)
    start = rows[-1]["start"] + rows[-1]["length"] if rows else 0
    with (
        shard.with_suffix(".i16").open("r+b" if rows else "wb") as audio,
        shard.with_suffix(".jsonl").open("a", encoding="utf-8") as index,
    ):
        audio.truncate(2 * start)
        audio.seek(2 * start)
        for row, samples in recordings:
            length = -(-len(samples) // SAMPLES_PER_FRAME) * SAMPLES_PER_FRAME
            audio.write(np.pad(samples, (0, length - len(samples))).tobytes())
            audio.flush()
            clip = Clip(start=start, length=length, **row)
            index.write(json.dumps(vars(clip), ensure_ascii=False) + "\n")
            index.flush()
            start += length
            yield start / SAMPLE_RATE_HZ / 3600.0


def open_audio(shard: Path) -> np.ndarray:
    """Map a shard's samples, shape (S,), int16."""
    return np.memmap(shard.with_suffix(".i16"), dtype=np.int16, mode="r")
