"""Stage 3: train the codec in parts that meet in features known beforehand.

    python codec.py encoder --work-dir W --minutes 60    # convolutions: waveform -> features
    python codec.py inner   --work-dir W --minutes 30    # transformers, quantizer: features -> same
    python codec.py decoder --work-dir W --minutes 90    # convolutions: features -> waveform
    python codec.py tuned   --work-dir W --minutes 60    # decoder, on quantized features

The first three need nothing of each other and run side by side; once there is an `inner`, a resumed
`encoder` also learns which errors the quantizer sees. `tuned` starts from `inner` and
`decoder` and adds discriminators. Every command resumes from its last checkpoint.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MimiModel

from adversary import Adversary
from batches import ASR_WIDTH, OUTPUT_LAG, Batch, BatchSampler
from codec_model import (
    MOST_BOOKS,
    NUM_BOOKS,
    QuantizerTrainer,
    codec_config,
    compress,
    expand,
    hear,
    initialise,
    sound,
)
from common import (
    Budget,
    TrainingLog,
    autocast,
    learning_rate,
    load_checkpoint,
    pick_device,
    save_checkpoint,
)
from corpus import SAMPLES_PER_FRAME, open_audio, read_clips, shard_paths
from features import HOP, NUM_COMPONENTS, Basis, open_spectra
from mel_loss import MelLoss

STAGES = ("encoder", "inner", "decoder", "tuned")
PREFIXES = {  # of the parameters that a stage trains
    "encoder": ("encoder.encoder_seanet.",),
    "inner": (
        "encoder.encoder_transformer.",
        "encoder.downsample.",
        "quantizer.",
        "decoder.upsample.",
        "decoder.decoder_transformer.",
    ),
    "decoder": ("decoder.decoder_seanet.",),
    "tuned": ("decoder.decoder_transformer.", "decoder.decoder_seanet."),
}
CONTEXT = 4  # features at the start of an excerpt that the encoder hears too little to know


@dataclass
class CodecSettings:
    """Settings of one run."""

    work_dir: Path
    stage: str
    minutes: float = 60.0  # budget over all sessions of the run
    steps: int = 1_000_000  # budget in steps, whichever is reached first
    peak_rate: float = 1e-3
    rate_floor: float = 0.05  # of the peak, at the end of the budget
    warmup_steps: int = 200
    clip_norm: float = 200.0
    items: int = 4  # excerpts of a step
    frames: int = 16  # codec frames of an excerpt
    seed: int = 1
    bypass_steps: int = 600  # of `inner`, before the quantizer is started by k-means
    commitment_weight: float = 0.25
    semantic_weight: float = 0.3
    latent_weight: float = 0.5  # of `encoder`'s distance as the quantizer sees it, after `inner`
    fewer_books_share: float = 0.5  # items trained with a random number of acoustic codebooks
    adversary_after: int = 1_000  # steps of `tuned` on spectra alone
    adversary_rate: float = 3e-4
    judged_frames: int = 8  # codec frames of an excerpt that the discriminators hear
    matching_weight: float = 2.0
    evaluate_every: int = 1_000
    save_every: int = 250
    bfloat16: bool = True


class FeatureDistance(nn.Module):
    """Distance of two sets of features: L1 of the log-mel spectra and of pitch and voicing."""

    PITCH_WEIGHT = 0.3

    def __init__(self, basis: Basis) -> None:
        super().__init__()
        self.register_buffer("backward_map", torch.from_numpy(basis.backward))

    def forward(self, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean log10-mel distance, pitch distance) of features (B, T, 256)."""
        difference = ours - theirs
        mel = (difference[..., :NUM_COMPONENTS] @ self.backward_map).abs().mean()
        return mel, self.PITCH_WEIGHT * difference[..., NUM_COMPONENTS:].abs().mean()


class CodecTrainer:
    """One training run of one stage."""

    def __init__(self, settings: CodecSettings) -> None:
        self.settings, self.device = settings, pick_device()
        torch.manual_seed(settings.seed)
        self.sampler = BatchSampler(
            settings.work_dir, settings.items, settings.frames, settings.seed
        )
        self.basis = self.sampler.basis
        self.model = MimiModel(codec_config())
        initialise(self.model)
        self.distil = nn.Linear(codec_config().codebook_dim, ASR_WIDTH)
        self.model.to(self.device)
        self.distil.to(self.device)
        self.quantizer = QuantizerTrainer(self.model)
        self.distance = FeatureDistance(self.basis).to(self.device)
        self.mel_loss = MelLoss().to(self.device)
        self.directory = settings.work_dir / "codec"
        self.log = TrainingLog(self.directory / f"{settings.stage}.jsonl")
        own = load_checkpoint(self.directory / f"{settings.stage}.pt", self.device)
        if settings.stage in ("encoder", "tuned"):
            found = assemble(self.model, self.directory, self.device)
            self.has_inner = "inner" in found
        self.model.requires_grad_(False)
        named = [*self.model.named_parameters()]
        self.parameters = [p for name, p in named if name.startswith(PREFIXES[settings.stage])]
        if settings.stage == "inner":
            self.parameters += self.distil.parameters()
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.peak_rate, betas=(0.8, 0.99), weight_decay=1e-3, fused=True
        )
        self.adversary = Adversary().to(self.device)
        self.adversary_optimizer = torch.optim.AdamW(
            self.adversary.parameters(), lr=settings.adversary_rate, betas=(0.8, 0.99)
        )
        self.step, elapsed_s = 0, 0.0
        if own is not None:
            trained = {
                k: v for k, v in own["model"].items() if k.startswith(PREFIXES[settings.stage])
            }
            self.model.load_state_dict(trained, strict=False)
            self.distil.load_state_dict(own["distil"])
            if settings.stage == "tuned":
                self.adversary.load_state_dict(own["adversary"])
                self.adversary_optimizer.load_state_dict(own["adversary_optimizer"])
            self.optimizer.load_state_dict(own["optimizer"])
            torch.set_rng_state(own["rng"].cpu())
            self.step, elapsed_s = own["step"], own["elapsed_s"]
        self.budget = Budget(settings.steps, settings.minutes, elapsed_s)
        self.collected: list[Tensor] = []
        self.losses: Callable[[Batch], dict[str, Tensor]] = getattr(self, f"_{settings.stage}")

    def _encoder(self, batch: Batch) -> dict[str, Tensor]:
        heard = hear(self.model, batch.wave).float()
        mel, pitch = self.distance(heard[:, CONTEXT:], batch.features[:, CONTEXT:])
        if not self.has_inner:
            return {"loss": mel + pitch, "mel": mel, "pitch": pitch}
        ours = self._projected(torch.cat([batch.features[:, :CONTEXT], heard[:, CONTEXT:]], 1))
        with torch.no_grad():
            theirs = self._projected(batch.features)
        latent = (ours - theirs).square().sum(1).mean() / theirs.square().sum(1).mean()
        loss = mel + pitch + self.settings.latent_weight * latent
        return {"loss": loss, "mel": mel, "pitch": pitch, "latent": latent}

    def _projected(self, features: Tensor) -> Tensor:
        """Return what the quantizers compare with their codebooks, (B, 2 T, D) -> (B, d, T)."""
        latents = compress(self.model, features)
        books = (self.quantizer.semantic, self.quantizer.acoustic)
        return torch.cat([book.input_proj(latents).float() for book in books], dim=1)

    def _inner(self, batch: Batch) -> dict[str, Tensor]:
        settings = self.settings
        bypass = self.step < settings.bypass_steps
        count = len(batch.features)
        num_acoustic = torch.full((count,), MOST_BOOKS - 1, device=self.device)
        fewer = torch.rand(count) < settings.fewer_books_share
        num_acoustic[fewer] = torch.randint(1, MOST_BOOKS, (int(fewer.sum()),), device=self.device)
        latents = compress(self.model, batch.features).float()
        if bypass and self.step >= settings.bypass_steps - 100:
            self.collected.append(latents.detach().transpose(1, 2).flatten(0, 1))
        quantized = self.quantizer(latents, num_acoustic, bypass)
        mel, pitch = self.distance(expand(self.model, quantized.latents).float(), batch.features)
        guess = self.distil(quantized.semantic.transpose(1, 2)).float()
        distances = 1.0 - F.cosine_similarity(guess, batch.asr, dim=-1)
        share = batch.has_asr.float()[:, None]
        semantic = (distances * share).mean() / share.mean().clamp(min=1e-3)
        loss = mel + pitch + settings.semantic_weight * semantic * share.mean()
        loss = loss + settings.commitment_weight * quantized.commitment
        if not bypass:
            self.quantizer.update(self.quantizer.statistics(quantized))
            if self.step % 10 == 0:
                self.quantizer.restart_dead(quantized)
        parts = {"mel": mel, "pitch": pitch, "commitment": quantized.commitment}
        return {"loss": loss, **parts, "semantic": semantic}

    def _decoder(self, batch: Batch) -> dict[str, Tensor]:
        return self._spectra(sound(self.model, batch.features), batch.target)

    def _tuned(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            latents = compress(self.model, batch.features).float()
            full = torch.full((len(latents),), NUM_BOOKS - 1, device=self.device)
            quantized = self.quantizer(latents, full)
        output = sound(self.model, expand(self.model, quantized.latents))
        parts = self._spectra(output, batch.target)
        if self.step < self.settings.adversary_after or not torch.is_grad_enabled():
            return parts
        size = self.settings.judged_frames * SAMPLES_PER_FRAME
        begin = int(torch.randint(output.shape[1] - size + 1, ()))
        ours, theirs = (wave[:, begin : begin + size] for wave in (output, batch.target))
        own = self.adversary.own_loss(ours.detach(), theirs)
        self.adversary_optimizer.zero_grad()
        own.backward()
        self.adversary_optimizer.step()
        self.adversary.requires_grad_(False)
        adversarial, matching = self.adversary.decoder_losses(ours, theirs)
        self.adversary.requires_grad_(True)
        loss = parts["loss"] + adversarial + self.settings.matching_weight * matching
        parts |= {"adversary": own, "adversarial": adversarial, "matching": matching}
        return parts | {"loss": loss}

    def _spectra(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        mel, convergence = self.mel_loss(output.float(), target)
        return {"loss": 10.0 * mel + convergence, "mel": mel, "convergence": convergence}

    def train_step(self) -> dict[str, float]:
        """Take one step; return the loss parts and the gradient norm."""
        settings = self.settings
        if settings.stage == "inner" and self.step == settings.bypass_steps:
            self._start_codebooks()
        batch = self.sampler.batch(self.step).to(self.device)
        with autocast(self.device, settings.bfloat16):
            parts = self.losses(batch)
        self.optimizer.zero_grad()
        parts["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm)
        progress = self.budget.progress(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(
                settings.peak_rate, self.step, progress, settings.warmup_steps, settings.rate_floor
            )
        self.optimizer.step()
        self.step += 1
        return {name: float(part.detach()) for name, part in parts.items()} | {"norm": float(norm)}

    def _start_codebooks(self) -> None:
        if not self.collected:  # resumed between collecting and starting
            for step in range(100):
                features = self.sampler.batch(step).features.to(self.device)
                with torch.no_grad():
                    latents = compress(self.model, features).float()
                self.collected.append(latents.transpose(1, 2).flatten(0, 1))
        frames = self.settings.items * self.settings.frames
        self.quantizer.start(torch.cat(self.collected), frames)
        self.collected = []

    @torch.no_grad()
    def evaluate(self, num_clips: int = 20) -> dict:
        """Return the stage's loss on held-out clips; for `inner` with 4, 8 and 12 codebooks."""
        results: dict[str, list[float]] = {}
        for batch in held_out_batches(self.settings.work_dir, self.basis, num_clips):
            batch = batch.to(self.device)
            with autocast(self.device, self.settings.bfloat16):
                if self.settings.stage != "inner":
                    parts = {k: float(v) for k, v in self.losses(batch).items()}
                else:
                    parts = {}
                    latents = compress(self.model, batch.features).float()
                    for books in (4, 8, MOST_BOOKS):
                        count = torch.tensor([books - 1], device=self.device)
                        bypass = self.step < self.settings.bypass_steps
                        quantized = self.quantizer(latents, count, bypass)
                        output = expand(self.model, quantized.latents).float()
                        mel, pitch = self.distance(output, batch.features)
                        parts |= {f"mel_{books}": float(mel), f"pitch_{books}": float(pitch)}
            for name, value in parts.items():
                results.setdefault(name, []).append(value)
        return {f"held_out_{name}": float(np.mean(values)) for name, values in results.items()}

    def save(self) -> None:
        """Write the run's checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "distil": self.distil.state_dict(),
            "adversary": self.adversary.state_dict(),
            "adversary_optimizer": self.adversary_optimizer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "elapsed_s": self.budget.elapsed_s,
            "settings": {k: str(v) for k, v in asdict(self.settings).items()},
        }
        save_checkpoint(self.directory / f"{self.settings.stage}.pt", state)

    def run(self) -> None:
        """Train until the budget is used, logging, evaluating and saving on the way."""
        sums: dict[str, float] = {}
        count, done = 0, False
        while not done:
            for name, value in self.train_step().items():
                sums[name] = sums.get(name, 0.0) + value
            count += 1
            done = self.budget.progress(self.step) >= 1.0
            common = {"step": self.step, "elapsed_s": self.budget.elapsed_s}
            if self.step % 100 == 0 or done:
                rate = self.optimizer.param_groups[0]["lr"]
                means = {name: value / count for name, value in sums.items()}
                self.log.write(**common, rate=rate * 1e3, **means)
                sums, count = {}, 0
            if self.step % self.settings.evaluate_every == 0 or done:
                self.log.write(**common, **self.evaluate())
            if self.step % self.settings.save_every == 0 or done:
                self.save()


def assemble(model: MimiModel, directory: Path, device: torch.device) -> dict[str, int]:
    """Load the newest trained weights of each part into one codec; return the steps of each."""
    steps = {}
    for stage in STAGES:
        state = load_checkpoint(directory / f"{stage}.pt", device)
        if state is not None:
            steps[stage] = state["step"]
            part = {k: v for k, v in state["model"].items() if k.startswith(PREFIXES[stage])}
            model.load_state_dict(part, strict=False)
    for book in QuantizerTrainer(model).books:
        book._embed = None  # the cached quotient
    return steps


def held_out_batches(work_dir: Path, basis: Basis, num_clips: int) -> list[Batch]:
    """Return the first held-out clips as batches of one, whole."""
    batches = []
    for shard in shard_paths(work_dir):
        clips = read_clips(shard, "held_out")
        for clip in clips[:: max(1, len(clips) // num_clips)] if clips else []:
            mel, pitch = open_spectra(shard)
            rows = slice(clip.start // HOP, (clip.start + clip.length) // HOP)
            samples = open_audio(shard)[clip.start : clip.start + clip.length] / np.float32(32768)
            lagged = np.concatenate([np.zeros(OUTPUT_LAG, np.float32), samples[:-OUTPUT_LAG]])
            asr = np.zeros((clip.length // SAMPLES_PER_FRAME, ASR_WIDTH), np.float32)
            features = basis.features(mel[rows], pitch[rows])
            parts = (samples, lagged, features, asr, np.bool_(False))
            batches.append(Batch(*(torch.from_numpy(np.asarray(part)[None]) for part in parts)))
    return batches


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work-dir", type=Path, required=True)
    for name in ("minutes", "steps", "peak_rate", "items", "frames", "adversary_after"):
        default = getattr(CodecSettings, name, None)
        kind = {"minutes": float, "peak_rate": float}.get(name, int)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default)
    CodecTrainer(CodecSettings(**vars(parser.parse_args()))).run()


if __name__ == "__main__":
    main()
