"""Stage 2: spectra and pitch of every recording, and a recogniser's view of some.

    python features.py spectra    --work-dir W
    python features.py recogniser --work-dir W --whisper tiny.en --shards corpus h0 --hours 2

`spectra` writes SHARD.mel and SHARD.f0; `basis.npz` is fitted once, on the first shards. A frame of
the codec is described by *features*: the log-mel spectra of 40 ms in a basis of principal
components, with pitch and voicing. They are what the codec's outer parts are trained to compute and
to sound (codec.py). `recogniser` writes SHARD.asr, the encoder output of Whisper.

Windows end where their 10 ms end, so features of a codec frame never look past its last sample.
"""

import argparse
from pathlib import Path

import numpy as np

from corpus import SAMPLE_RATE_HZ, open_audio, read_clips, shard_paths

HOP = 240  # 10 ms
WINDOW = 768  # 32 ms
NUM_FFT = 1_024
NUM_MELS = 80
FLOOR = 3e-4  # of a full-scale sine in a band: about -70 dB
BLOCK = 4  # spectra of one feature vector: 40 ms, 25 per second
NUM_COMPONENTS = 248
NUM_PITCH = 2 * BLOCK  # voicing and log pitch of each 10 ms
PITCH_CENTRE_HZ = 160.0
PITCH_RANGE_HZ = (55.0, 500.0)
WHISPER_WINDOW_S, WHISPER_MARGIN_S, WHISPER_RATE_HZ = 30, 1, 50


def mel_filters(num_fft: int, num_mels: int) -> np.ndarray:
    """Return triangular filters on the HTK mel scale, (num_fft // 2 + 1, num_mels) float32."""
    hertz = np.linspace(0.0, SAMPLE_RATE_HZ / 2, num_fft // 2 + 1)
    top = 2595.0 * np.log10(1.0 + SAMPLE_RATE_HZ / 2 / 700.0)
    edges = 700.0 * (10.0 ** (np.linspace(0.0, top, num_mels + 2) / 2595.0) - 1.0)
    rising = (hertz[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)


_FILTERS = mel_filters(NUM_FFT, NUM_MELS)
_TAPER = np.hanning(WINDOW + 1)[:-1].astype(np.float32)


def log_mel(samples: np.ndarray) -> np.ndarray:
    """Return log10 mel spectra of float32 samples (S,), 100 per second: (S / 240, 80) float32."""
    padded = np.concatenate([np.zeros(WINDOW - HOP, np.float32), samples])
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP] * _TAPER
    magnitude = np.abs(np.fft.rfft(frames, NUM_FFT)).astype(np.float32) * (2.0 / _TAPER.sum())
    return np.log10(np.maximum(magnitude @ _FILTERS, FLOOR))


def pitch_hz(samples: np.ndarray) -> np.ndarray:
    """Return pitch at the centres of the windows of `log_mel`, (S / 240,) float32, 0 unvoiced."""
    import pyworld  # only this step needs it

    wave = samples.astype(np.float64)
    low, high = PITCH_RANGE_HZ
    track, times = pyworld.dio(
        wave, SAMPLE_RATE_HZ, f0_floor=low, f0_ceil=high, frame_period=10.0, speed=4
    )
    track = pyworld.stonemask(wave, track, times, SAMPLE_RATE_HZ)
    count = len(samples) // HOP
    centres = (np.arange(1, count + 1) * HOP - WINDOW / 2) / HOP  # in frames of the tracker
    before = np.clip(np.floor(centres).astype(int), 0, len(track) - 1)
    after = np.clip(before + 1, 0, len(track) - 1)
    share = np.clip(centres - before, 0.0, 1.0)
    both = (track[before] > 0) & (track[after] > 0)
    nearest = np.where(share < 0.5, track[before], track[after])
    mixed = track[before] * (1 - share) + track[after] * share
    return np.where(both, mixed, nearest).astype(np.float32)


def write_spectra(shard: Path) -> None:
    """Write SHARD.mel and SHARD.f0 of the clips that have none yet."""
    audio = open_audio(shard)
    mel_path, pitch_path = shard.with_suffix(".mel"), shard.with_suffix(".f0")
    done = mel_path.stat().st_size // (2 * NUM_MELS) if mel_path.exists() else 0
    with mel_path.open("ab") as mels, pitch_path.open("ab") as pitches:
        pitches.truncate(2 * done)
        for clip in read_clips(shard):
            if clip.start // HOP < done:
                continue
            samples = audio[clip.start : clip.start + clip.length].astype(np.float32) / 32768.0
            pitches.write(pitch_hz(samples).astype(np.float16).tobytes())
            pitches.flush()
            mels.write(log_mel(samples).astype(np.float16).tobytes())
            mels.flush()


def open_spectra(shard: Path) -> tuple[np.ndarray, np.ndarray]:
    """Map a shard's spectra (N, 80) and pitch (N,), float16."""
    mel = np.memmap(shard.with_suffix(".mel"), dtype=np.float16, mode="r").reshape(-1, NUM_MELS)
    return mel, np.memmap(shard.with_suffix(".f0"), dtype=np.float16, mode="r")[: len(mel)]


def fit_basis(work_dir: Path, most_blocks: int = 300_000) -> None:
    """Write `basis.npz`: mean, principal directions and scales of 40 ms of log-mel spectra."""
    path = work_dir / "basis.npz"
    if path.exists():
        return
    blocks = []
    for shard in shard_paths(work_dir):
        mel, _ = open_spectra(shard)
        whole = mel[: len(mel) // BLOCK * BLOCK].reshape(-1, BLOCK * NUM_MELS)
        step = max(1, len(whole) * len(shard_paths(work_dir)) // most_blocks)
        blocks.append(whole[::step].astype(np.float32))
    values = np.concatenate(blocks)
    mean = values.mean(axis=0)
    _, spread, directions = np.linalg.svd(np.cov((values - mean).T), hermitian=True)
    deviation = np.sqrt(spread[:NUM_COMPONENTS])
    print(f"kept variance {spread[:NUM_COMPONENTS].sum() / spread.sum():.5f}")
    np.savez(path, mean=mean, directions=directions[:NUM_COMPONENTS], deviation=deviation)


class Basis:
    """The map between spectra with pitch and feature vectors.

    A component is divided by the root of its deviation: half-way between equal weights and those
    of the spectrum, so that small components can still be learned.
    """

    def __init__(self, work_dir: Path) -> None:
        stored = np.load(work_dir / "basis.npz")
        self.mean = stored["mean"].astype(np.float32)
        self.scale = np.sqrt(stored["deviation"]).astype(np.float32)
        self.directions = stored["directions"].astype(np.float32)  # (248, 320)
        self.forward = (self.directions / self.scale[:, None]).T.copy()
        self.backward = self.directions * self.scale[:, None]

    def features(self, mel: np.ndarray, pitch: np.ndarray) -> np.ndarray:
        """Map spectra (4 N, 80) and pitch (4 N,) to features (N, 256) float32."""
        blocks = mel.reshape(-1, BLOCK * NUM_MELS).astype(np.float32) - self.mean
        pitch = pitch.reshape(-1, BLOCK).astype(np.float32)
        voiced = (pitch > 0).astype(np.float32)
        octaves = np.log2(np.maximum(pitch, 1.0) / PITCH_CENTRE_HZ) * voiced
        return np.concatenate([blocks @ self.forward, voiced, octaves], axis=1)


def write_recogniser(shard: Path, whisper: str, hours: float) -> None:
    """Write SHARD.asr, float16 (50 per second, width): Whisper's encoder output, standardised.

    Windows of 30 s overlap by two margins and only their middles are kept. Each channel is
    standardised, or a few large ones would decide every cosine.
    """
    from faster_whisper import WhisperModel
    from scipy.signal import resample_poly

    path = shard.with_suffix(".asr")
    if path.exists():
        return
    model = WhisperModel(whisper, device="auto", compute_type="default", cpu_threads=1)
    audio = open_audio(shard)
    step_s = WHISPER_WINDOW_S - 2 * WHISPER_MARGIN_S
    num_windows = min(len(audio), int(hours * 3600 * SAMPLE_RATE_HZ)) // (step_s * SAMPLE_RATE_HZ)
    parts = []
    for window in range(num_windows):
        begin = (window * step_s - WHISPER_MARGIN_S) * SAMPLE_RATE_HZ
        chunk = np.zeros(WHISPER_WINDOW_S * SAMPLE_RATE_HZ, np.float32)
        source = audio[max(begin, 0) : begin + len(chunk)]
        chunk[max(-begin, 0) : max(-begin, 0) + len(source)] = source / 32768.0
        mel = model.feature_extractor(resample_poly(chunk, 2, 3).astype(np.float32))
        hidden = np.asarray(model.encode(mel[:, : WHISPER_WINDOW_S * 100]))[0]
        margin = WHISPER_MARGIN_S * WHISPER_RATE_HZ
        parts.append(hidden[margin : margin + step_s * WHISPER_RATE_HZ].astype(np.float32))
        if window % 50 == 0:
            print(f"window {window} of {num_windows}", flush=True)
    values = np.concatenate(parts)
    values = (values - values.mean(axis=0)) / (values.std(axis=0) + 1e-6)
    temporary = path.with_suffix(".tmp")
    values.astype(np.float16).tofile(temporary)
    temporary.replace(path)


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["spectra", "recogniser"])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--shards", nargs="*", help="only these")
    parser.add_argument("--whisper", default="tiny.en", help="a faster-whisper model or its folder")
    parser.add_argument("--hours", type=float, default=1e9, help="of each shard, at most")
    arguments = parser.parse_args()
    for shard in shard_paths(arguments.work_dir):
        if arguments.shards and shard.name not in arguments.shards:
            continue
        print(shard.name, flush=True)
        if arguments.command == "spectra":
            write_spectra(shard)
        else:
            write_recogniser(shard, arguments.whisper, arguments.hours)
    if arguments.command == "spectra" and not arguments.shards:
        fit_basis(arguments.work_dir)


if __name__ == "__main__":
    main()
