"""Stage 1: bring recorded speech into shards.

    python recordings.py corpus  --work-dir W --shard corpus --source DIR
    python recordings.py folders --work-dir W --shard prompts --source DIR DIR ...

`corpus` reads a folder with `manifest.jsonl` (audio, text, speaker) and `audio.tar`; the recordings
named in `held_out.txt` are kept out of training. `folders` reads folders of sound files, one
speaker each, that only the codec hears. Run again after a stop; a finished shard is left alone.
"""

import argparse
import io
import json
import random
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from corpus import SAMPLE_RATE_HZ, read_rows, to_int16, write_shard

HELD_OUT_FILE = Path(__file__).with_name("held_out.txt")
SUFFIXES = {".g722", ".wav", ".ogg", ".flac"}
LEAST_S, LEAST_PEAK = 0.25, 300  # shorter or fainter recordings are left out


def decode_file(data: bytes, suffix: str) -> np.ndarray:
    """Decode one recording to 24 kHz mono.

    Args:
        data: the file's bytes.
        suffix: ".g722" (decoded by ffmpeg, 16 kHz) or anything libsndfile reads.

    Returns:
        int16, shape (S,).
    """
    if suffix == ".g722":
        command = "ffmpeg -v error -f g722 -i pipe:0 -f s16le -ac 1 -ar 16000 pipe:1"
        raw = subprocess.run(command.split(), input=data, capture_output=True, check=True).stdout
        samples, rate_hz = np.frombuffer(raw, np.int16) / 32768.0, 16_000
    else:
        samples, rate_hz = soundfile.read(io.BytesIO(data), always_2d=True)
        samples = samples.mean(axis=1)
    if rate_hz != SAMPLE_RATE_HZ:
        common = int(np.gcd(rate_hz, SAMPLE_RATE_HZ))
        samples = resample_poly(samples, SAMPLE_RATE_HZ // common, rate_hz // common)
    return to_int16(samples)


def corpus_recordings(source: Path) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield (row, samples) of each recording of the corpus."""
    held_out = set(HELD_OUT_FILE.read_text(encoding="utf-8").split())
    lines = (source / "manifest.jsonl").read_text("utf-8").splitlines()
    with tarfile.open(source / "audio.tar") as archive:
        for line in lines:
            row = json.loads(line)
            split = "held_out" if row["audio"] in held_out else "train"
            data = archive.extractfile(row["audio"]).read()
            kept = {"name": row["audio"], "speaker": row["speaker"], "text": row["text"]}
            yield kept | {"split": split}, decode_file(data, Path(row["audio"]).suffix)


def folder_recordings(folders: list[Path]) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield (row, samples) of each sound file, in an order that mixes the folders."""
    paths = [
        (number, path)
        for number, folder in enumerate(folders, start=1)
        for path in sorted(folder.rglob("*"))
        if path.suffix in SUFFIXES and not path.is_symlink()
    ]
    random.Random(1).shuffle(paths)
    for number, path in paths:
        samples = decode_file(path.read_bytes(), path.suffix)
        if len(samples) >= LEAST_S * SAMPLE_RATE_HZ and np.abs(samples).max() > LEAST_PEAK:
            folder = folders[number - 1]
            name = f"{folder.name}/{path.relative_to(folder)}"
            yield {"name": name, "speaker": -number, "text": "", "split": "train"}, samples


def main() -> None:
    """Read the options and write a shard."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["corpus", "folders"])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--shard", required=True, help="name of the shard")
    parser.add_argument("--source", type=Path, nargs="+", required=True)
    arguments = parser.parse_args()
    shard = arguments.work_dir / "shards" / arguments.shard
    recordings = (
        corpus_recordings(arguments.source[0])
        if arguments.kind == "corpus"
        else folder_recordings(arguments.source)
    )
    done = {row["name"] for row in read_rows(shard)}
    fresh = ((row, samples) for row, samples in recordings if row["name"] not in done)
    hours = max(write_shard(shard, fresh), default=0.0)
    print(f"{arguments.shard}: {hours:.2f} hours")


if __name__ == "__main__":
    main()
