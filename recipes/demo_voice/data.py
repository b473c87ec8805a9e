"""Stage 1: decode the recordings to one memory-mapped file and hear them through a recogniser.

    python recipes/demo_voice/data.py decode   --work-dir W --corpus DIR [--prompts DIR ...]
    python recipes/demo_voice/data.py features --work-dir W --whisper DIR

`--corpus` is a folder with `manifest.jsonl` (audio, text, speaker) and `audio.tar`; `--prompts`
are folders of G.722 or WAV recordings, one speaker each, that only the codec hears. The features
are the targets of the codec's first codebook (see codec_model.py).
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

from common import SAMPLE_RATE_HZ, Clip, open_audio

HELD_OUT_PER_SPEAKER = 10
HELD_OUT_SEED = 20
HELD_OUT_FILE = Path(__file__).with_name("held_out.txt")
FEATURE_RATE_HZ = 50
WINDOW_S = 30  # the recogniser's fixed window
MARGIN_S = 1  # context kept on either side of the part of a window that is used


def held_out_names(rows: list[dict]) -> set[str]:
    """Return the names listed in `held_out.txt`, choosing them once if there is no such file."""
    if not HELD_OUT_FILE.exists():
        rng = random.Random(HELD_OUT_SEED)
        names = []
        for speaker in sorted({row["speaker"] for row in rows}):
            own = sorted(row["audio"] for row in rows if row["speaker"] == speaker)
            names += sorted(rng.sample(own, HELD_OUT_PER_SPEAKER))
        HELD_OUT_FILE.write_text("\n".join(names) + "\n", encoding="utf-8")
    return set(HELD_OUT_FILE.read_text(encoding="utf-8").split())


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Round float samples in [-1, 1] to int16."""
    return np.clip(np.round(samples * 32767.0), -32768, 32767).astype(np.int16)


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


def corpus_clips(corpus: Path) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield (index row, samples) for each clip of the corpus, held-out clips last."""
    lines = (corpus / "manifest.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    held_out = held_out_names(rows)
    with tarfile.open(corpus / "audio.tar") as archive:
        for row in sorted(rows, key=lambda row: row["audio"] in held_out):
            split = "held_out" if row["audio"] in held_out else "train"
            data = archive.extractfile(row["audio"]).read()
            yield (
                {
                    "name": row["audio"],
                    "speaker": row["speaker"],
                    "text": row["text"],
                    "split": split,
                },
                decode_file(data, Path(row["audio"]).suffix),
            )


def prompt_clips(folders: list[Path]) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield (index row, samples) for recordings that only the codec hears, speakers -1, -2, ..."""
    for number, folder in enumerate(folders, start=1):
        paths = sorted(p for p in folder.rglob("*") if p.suffix in {".g722", ".wav", ".flac"})
        for path in paths:
            samples = decode_file(path.read_bytes(), path.suffix)
            if len(samples) >= SAMPLE_RATE_HZ // 4 and np.abs(samples).max() > 300:
                name = f"{folder.name}/{path.relative_to(folder)}"
                yield {"name": name, "speaker": -number, "text": "", "split": "train"}, samples


def decode(work_dir: Path, corpus: Path, prompts: list[Path]) -> None:
    """Write `audio.i16` and `index.jsonl`; the index comes last and marks the stage as done."""
    if (work_dir / "index.jsonl").exists():
        print("index.jsonl exists: nothing to do")
        return
    work_dir.mkdir(parents=True, exist_ok=True)
    start, lines, seconds = 0, [], {}
    with (work_dir / "audio.i16").open("wb") as stream:
        for source in (prompt_clips(prompts), corpus_clips(corpus)):
            for row, samples in source:
                stream.write(samples.tobytes())
                clip = Clip(start=start, length=len(samples), **row)
                lines.append(json.dumps(vars(clip), ensure_ascii=False))
                start += len(samples)
                key = f"speaker {clip.speaker} {clip.split}"
                seconds[key] = seconds.get(key, 0.0) + len(samples) / SAMPLE_RATE_HZ
    temporary = work_dir / "index.tmp"
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(work_dir / "index.jsonl")
    print(json.dumps({key: round(value) for key, value in seconds.items()}, indent=1))


def features(work_dir: Path, whisper: str) -> None:
    """Write `features.f16`: the recogniser's encoder output for the whole of `audio.i16`.

    Windows of 30 s overlap by two margins, and only the middle of each is kept. Each of the
    channels is standardised, or a few large ones would decide every cosine.
    """
    if (work_dir / "features.f16").exists():
        print("features.f16 exists: nothing to do")
        return
    from faster_whisper import WhisperModel

    model = WhisperModel(whisper, device="auto", compute_type="default", cpu_threads=1)
    audio = open_audio(work_dir)
    step_s = WINDOW_S - 2 * MARGIN_S
    num_windows = -(-len(audio) // (step_s * SAMPLE_RATE_HZ))
    parts = []
    for window in range(num_windows):
        begin = (window * step_s - MARGIN_S) * SAMPLE_RATE_HZ
        chunk = np.zeros(WINDOW_S * SAMPLE_RATE_HZ, np.float32)
        source = audio[max(begin, 0) : begin + len(chunk)]
        chunk[max(-begin, 0) : max(-begin, 0) + len(source)] = source / 32768.0
        mel = model.feature_extractor(resample_poly(chunk, 2, 3).astype(np.float32))
        hidden = np.asarray(model.encode(mel[:, : WINDOW_S * 100]))[0]  # (1500, width)
        margin = MARGIN_S * FEATURE_RATE_HZ
        parts.append(hidden[margin : margin + step_s * FEATURE_RATE_HZ].astype(np.float32))
        if window % 50 == 0:
            print(f"window {window} of {num_windows}", flush=True)
    values = np.concatenate(parts)
    values = (values - values.mean(axis=0)) / (values.std(axis=0) + 1e-6)
    temporary = work_dir / "features.tmp"
    values.astype(np.float16).tofile(temporary)
    temporary.replace(work_dir / "features.f16")


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["decode", "features"])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, help="folder with manifest.jsonl and audio.tar")
    parser.add_argument("--prompts", type=Path, nargs="*", default=[], help="codec-only recordings")
    parser.add_argument("--whisper", default="tiny.en", help="a faster-whisper model or its folder")
    arguments = parser.parse_args()
    if arguments.command == "decode":
        decode(arguments.work_dir, arguments.corpus, arguments.prompts)
    else:
        features(arguments.work_dir, arguments.whisper)


if __name__ == "__main__":
    main()
