"""Stage 1: have speech made by offline synthesisers, any number of hours, in shards.

    python speech.py hibari --work-dir W --shard h0 --hours 6 --seed 1
    python speech.py kokoro --work-dir W --shard k0 --hours 1 --seed 2 --kokoro DIR

What a shard is, corpus.py says; the same command resumes a stopped run. Sentences come
from `chitchat-dataset`, each at most once in a shard.

`hibari` speaks in one voice from a harmonic-plus-noise model; moving its spectral envelope and its
pitch makes other speakers of it at no cost. `kokoro` has 54 voices and blends of two. It is slow
(about 1.5 times real time on a core); run it in the background.
"""

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import chitchat_dataset
import hibari
import numpy as np
import onnxruntime
from hibari import Hibari, dsp
from hibari.g2p import G2P

from corpus import (
    SAMPLE_RATE_HZ,
    held_out_keys,
    read_rows,
    sentence_key,
    to_int16,
    write_shard,
)

NAMED_VOICES = ("af_heart", "am_michael", "bf_emma", "bm_george")  # speakers 0-3
FIRST_OTHER_SPEAKER = 4  # the other voices of Kokoro, in alphabetical order
FIRST_DONOR = 100  # speakers made from hibari's voice
NUM_DONORS = 64
DONOR_SEED = 7
ENDINGS = re.compile(r"('s|'re|'ve|'ll|'m|'d|n't|s|ed|ing)$")
ODD_PHRASE_SHARE = 0.1  # of the sentences: random words, for the pronunciation of rare ones


def known_words() -> tuple[set[str], list[str]]:
    """Return all words of hibari's American lexicons, and the common ones of them as a list."""
    folder = Path(hibari.__file__).with_name("assets")
    gold, silver = (
        set(json.loads(gzip.decompress((folder / f"lexicon_us_{name}.json.gz").read_bytes())))
        for name in ("gold", "silver")
    )
    plain = sorted(word for word in gold if re.fullmatch(r"[a-z]{3,12}", word))
    return {word.lower() for word in gold | silver}, plain


def sentences() -> list[str]:
    """Return the clean, distinct messages of the chat corpus, held-out sentences left out."""
    known, _ = known_words()
    seen = held_out_keys()
    result = []
    for conversation in chitchat_dataset.Dataset().values():
        for turn in conversation["messages"]:
            for message in turn:
                text = re.sub(r"\s+", " ", message["text"].replace("\u2019", "'")).strip()
                words = re.findall(r"[a-z']+", text.lower())
                if not re.fullmatch(r"[A-Za-z',.?! -]+", text) or not 2 <= len(words) <= 22:
                    continue
                key = sentence_key(text)
                odd = (w for w in words if w.strip("'") not in known)
                if key not in seen and all(ENDINGS.sub("", w) in known for w in odd):
                    seen.add(key)
                    result.append(text)
    return result


def text_stream(seed: int) -> Iterator[str]:
    """Yield sentences in an order of the seed, a tenth of them phrases of random words."""
    rng = random.Random(seed)
    _, plain = known_words()
    pool = sentences()
    rng.shuffle(pool)
    for text in pool:
        if rng.random() < ODD_PHRASE_SHARE:
            words = rng.sample(plain, rng.randint(3, 8))
            yield " ".join(words).capitalize() + rng.choice(".,?")
        yield text


def trimmed(samples: np.ndarray, before_s: float = 0.08, after_s: float = 0.16) -> np.ndarray:
    """Cut silence at both ends, leaving a little."""
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    if len(loud) == 0:
        return samples[:0]
    first = max(0, loud[0] - int(before_s * SAMPLE_RATE_HZ))
    return samples[first : loud[-1] + int(after_s * SAMPLE_RATE_HZ)]


class HibariSpeakers:
    """Hibari's voice and the donors made of it."""

    def __init__(self) -> None:
        self.engine = Hibari(threads=1)

    @staticmethod
    def donor(number: int) -> dict[str, float]:
        """Return the settings of a donor: factors of formants, pitch, pitch range, tempo; dB."""
        rng = np.random.default_rng([DONOR_SEED, number])
        male = number % 2 == 0
        warp = rng.uniform(0.80, 0.95) if male else rng.uniform(0.93, 1.15)
        pitch = rng.uniform(0.45, 0.68) if male else rng.uniform(0.8, 1.3)
        return {
            "warp": warp,
            "pitch": pitch,
            "pitch_range": rng.uniform(0.7, 1.5),
            "speed": rng.uniform(0.85, 1.2),
            "tilt_db": rng.uniform(-4.0, 4.0),  # from 300 Hz to 6 kHz
            "breath_db": rng.uniform(-4.0, 5.0),
        }

    def speak(self, text: str, speaker: int, rng: np.random.Generator) -> np.ndarray:
        """Return float32 samples of one sentence; speaker 0 is the voice as it is."""
        parts = []
        for phonemes in self.engine.phonemize(text):
            ids = np.asarray([self.engine.ids(phonemes)], np.int64)
            settings = self.donor(speaker) if speaker >= FIRST_DONOR else None
            speed = (settings["speed"] if settings else 1.0) * rng.uniform(0.92, 1.08)
            inputs = {"ids": ids, "speed": np.asarray([speed], np.float32)}
            lh, th, ln, lr, phi, f0 = (out[0] for out in self.engine.sess.run(None, inputs))
            if settings:
                bins = np.arange(len(lh)) / settings["warp"]
                low = np.minimum(bins.astype(int), len(lh) - 2)
                share = np.clip(bins - low, 0.0, 1.0).astype(np.float32)[:, None]
                lh, th, ln, lr, phi = (
                    part[low] * (1 - share) + part[low + 1] * share
                    for part in (lh, th, ln, lr, phi)
                )
                octaves = np.log2(np.maximum(np.arange(len(lh)), 1) * 20.0 / 300.0)
                tilt = settings["tilt_db"] * np.clip(octaves / 4.3, 0.0, 1.0)[:, None]
                nepers = np.log(10.0) / 20.0
                lh, ln, lr = (part + (tilt * nepers).astype(np.float32) for part in (lh, ln, lr))
                ln = ln + settings["breath_db"] * nepers
                voiced = f0 > 40.0
                if voiced.any():
                    centre = np.exp(np.log(f0[voiced]).mean())
                    around = (np.maximum(f0, 1.0) / centre) ** settings["pitch_range"]
                    moved = np.maximum(centre * around * settings["pitch"], 50.0)
                    f0 = np.where(voiced, moved, f0).astype(np.float32)
            parts.append(dsp.synth(lh, th, ln, lr, phi, f0, rng))
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def pick(self, rng: np.random.Generator) -> tuple[int, str]:
        """Draw a speaker: the voice itself in two fifths of the sentences."""
        if rng.random() < 0.4:
            return 0, "hibari"
        number = FIRST_DONOR + int(rng.integers(NUM_DONORS))
        return number, "hibari"


class KokoroSpeakers:
    """Kokoro's voices and blends of two; needs `kokoro.onnx` and `voices/*.bin` in a folder."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(folder / "kokoro.onnx"), options)
        self.american = Hibari(threads=1)
        self.british = G2P(british=True)
        self.styles = {
            path.stem: np.fromfile(path, np.float32).reshape(510, 256)
            for path in sorted((folder / "voices").glob("*.bin"))
        }
        self.others = [name for name in self.styles if name not in NAMED_VOICES]

    def pick(self, rng: np.random.Generator) -> tuple[int, str]:
        """Draw a speaker: half named ones (the first has hibari's hours), a fifth blends."""
        draw = rng.random()
        if draw < 0.5:
            number = int(rng.integers(1, 4))
            return number, NAMED_VOICES[number]
        if draw < 0.8:
            number = int(rng.integers(len(self.others)))
            return FIRST_OTHER_SPEAKER + number, self.others[number]
        first, second = rng.choice(list(self.styles), 2, replace=False)
        return -1, f"{first}+{second}"

    def speak(self, text: str, voice: str, rng: np.random.Generator) -> np.ndarray:
        """Return float32 samples of one sentence."""
        names = voice.split("+")
        phonemes = self.british(text) if names[0].startswith("b") else self.american.g2p(text)
        ids = self.american.ids(phonemes)
        if not 3 <= len(ids) <= 400:
            return np.zeros(0, np.float32)
        share = rng.uniform(0.3, 0.7) if len(names) == 2 else 1.0
        style = self.styles[names[0]][len(phonemes) - 1] * share
        if len(names) == 2:
            style = style + self.styles[names[1]][len(phonemes) - 1] * (1.0 - share)
        inputs = {
            "tokens": np.asarray([ids], np.int64),
            "style": style[None].astype(np.float32),
            "speed": np.asarray([rng.uniform(0.95, 1.1)], np.float32),
        }
        return self.session.run(None, inputs)[0].reshape(-1)


def recordings(arguments: argparse.Namespace, done: int) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield (row, samples) of one sentence after the other, those after number `done`."""
    hibari_engine = arguments.engine == "hibari"
    engine = HibariSpeakers() if hibari_engine else KokoroSpeakers(arguments.kokoro)
    for number, text in enumerate(text_stream(arguments.seed)):
        if number <= done:
            continue
        rng = np.random.default_rng([arguments.seed, number])
        speaker, voice = engine.pick(rng)
        samples = engine.speak(text, speaker if hibari_engine else voice, rng)
        if len(samples) and len(trimmed(samples)) > SAMPLE_RATE_HZ // 3:
            name = f"{arguments.shard}/{number}"
            row = {"name": name, "speaker": speaker, "text": text, "split": "train"}
            yield row, to_int16(trimmed(samples))


def make_shard(arguments: argparse.Namespace) -> None:
    """Write one shard, going on from where it stopped."""
    shard = arguments.work_dir / "shards" / arguments.shard
    rows = read_rows(shard)
    done = int(rows[-1]["name"].rpartition("/")[2]) if rows else -1
    for count, hours in enumerate(write_shard(shard, recordings(arguments, done))):
        if count % 200 == 0:
            print(f"{hours:.2f} hours", flush=True)
        if hours >= arguments.hours:
            break


def main() -> None:
    """Read the options and write a shard."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=["hibari", "kokoro"])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--shard", required=True, help="name of the shard")
    parser.add_argument("--hours", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--kokoro", type=Path, help="folder with kokoro.onnx and voices/*.bin")
    make_shard(parser.parse_args())


if __name__ == "__main__":
    main()
