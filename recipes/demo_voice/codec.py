"""Stage 2: train the codec.

    python recipes/demo_voice/codec.py joint   --work-dir W --minutes 60
    python recipes/demo_voice/codec.py decoder --work-dir W --minutes 40

`joint` trains encoder, quantizer and decoder. `decoder` then freezes the first two, so that the
codes stay as they are while the language model trains on them, and goes on with the decoder alone.
Both resume from their last checkpoint. Under `torchrun --nproc-per-node N` (gloo or nccl) each
process trains on its own crops and gradients are averaged.
"""

import argparse
import copy
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MimiModel

from codec_model import (
    QuantizerTrainer,
    codec_config,
    decode_latents,
    encode_latents,
    initialise,
)
from common import (
    SAMPLES_PER_FRAME,
    Budget,
    TrainingLog,
    autocast,
    clip_samples,
    learning_rate,
    load_checkpoint,
    pick_device,
    read_clips,
    save_checkpoint,
)
from crops import CropSampler, CropSettings
from mel_loss import MelLoss


@dataclass
class CodecSettings:
    """Settings of one run; `stage` is "joint" or "decoder"."""

    work_dir: Path
    stage: str = "joint"
    minutes: float = 60.0  # budget over all sessions of the run
    steps: int = 60_000  # budget in steps, whichever is reached first
    peak_rate: float = 1e-3
    rate_floor: float = 0.05  # of the peak, at the end of the budget
    warmup_steps: int = 200
    clip_norm: float = 200.0
    bypass_steps: int = 600  # steps before the quantizer is started by k-means
    mel_weight: float = 10.0
    commitment_weight: float = 0.25
    semantic_weight: float = 2.0
    fewer_books_share: float = 0.25  # items trained with a random number of acoustic codebooks
    restart_every: int = 10
    evaluate_every: int = 1_000
    save_every: int = 250
    bfloat16: bool = True
    crops: CropSettings = field(default_factory=CropSettings)


class CodecTrainer:
    """One process of a training run."""

    def __init__(self, settings: CodecSettings) -> None:
        self.settings = settings
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device()
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            if self.device.type == "cuda":
                self.device = torch.device("cuda", self.rank)
        torch.manual_seed(settings.crops.seed)
        self.sampler = CropSampler(settings.crops, settings.work_dir, self.rank)
        self.model = MimiModel(codec_config())
        initialise(self.model)
        self.model.to(self.device)
        self.trainer = QuantizerTrainer(self.model)
        self.distil = nn.Linear(codec_config().codebook_dim, settings.crops.feature_width).to(
            self.device
        )
        self.mel_loss = MelLoss().to(self.device)
        self.step, elapsed_s = 0, 0.0
        self.directory = settings.work_dir / "codec"
        self.log = TrainingLog(self.directory / f"{settings.stage}.jsonl")
        own = load_checkpoint(self.directory / f"{settings.stage}.pt", self.device)
        if own is None and settings.stage == "decoder":
            joint = load_checkpoint(self.directory / "joint.pt", self.device)
            self.model.load_state_dict(joint["model"])
        if settings.stage == "decoder":
            self.model.requires_grad_(False)
            self.model.decoder.requires_grad_(True)
            self.distil.requires_grad_(False)
        candidates = [*self.model.parameters(), *self.distil.parameters()]
        self.parameters = [p for p in candidates if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.peak_rate, betas=(0.8, 0.99), weight_decay=1e-3, fused=True
        )
        if own is not None:
            self.model.load_state_dict(own["model"])
            self.distil.load_state_dict(own["distil"])
            self.optimizer.load_state_dict(own["optimizer"])
            torch.set_rng_state(own["rng"].cpu())
            self.step, elapsed_s = own["step"], own["elapsed_s"]
        self.budget = Budget(settings.steps, settings.minutes, elapsed_s)
        self.collected: list[Tensor] = []

    def losses(self, waveforms: Tensor, features: Tensor | None) -> tuple[Tensor, dict, object]:
        """Return the loss, its parts for the log, and what the quantizer returned."""
        settings = self.settings
        joint = settings.stage == "joint"
        bypass = joint and self.step < settings.bypass_steps
        num_acoustic = torch.full((len(waveforms),), 7, device=self.device)
        fewer = torch.rand(len(waveforms)) < settings.fewer_books_share
        if joint:
            num_acoustic[fewer] = torch.randint(1, 8, (int(fewer.sum()),), device=self.device)
        with autocast(self.device, settings.bfloat16):
            with torch.set_grad_enabled(joint):
                latents = encode_latents(self.model, waveforms)
                quantized = self.trainer(latents.float(), num_acoustic, bypass)
            output = decode_latents(self.model, quantized.latents)
        if bypass and self.step >= settings.bypass_steps - 100:
            self.collected.append(latents.detach().float().transpose(1, 2).flatten(0, 1))
        mel, convergence = self.mel_loss(output.float(), waveforms)
        loss = settings.mel_weight * mel + convergence
        parts = {"mel": mel, "convergence": convergence}
        if joint:
            loss = loss + settings.commitment_weight * quantized.commitment
            parts["commitment"] = quantized.commitment
        if joint and features is not None:
            guess = self.distil(quantized.semantic.transpose(1, 2))
            distance = 1.0 - F.cosine_similarity(guess, features, dim=-1).mean()
            loss = loss + settings.semantic_weight * distance
            parts["semantic"] = distance
        return loss, parts, quantized

    def _sum_over_ranks(self, tensors: list[Tensor]) -> None:
        if self.world > 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def train_step(self) -> tuple[dict, float]:
        """Take one step; return the loss parts and the gradient norm."""
        settings = self.settings
        if settings.stage == "joint" and self.step == settings.bypass_steps:
            self._start_codebooks()
        waveforms, features = self.sampler.batch(self.step)
        waveforms = waveforms.to(self.device)
        features = None if features is None else features.to(self.device)
        loss, parts, quantized = self.losses(waveforms, features)
        self.optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        learns_codes = settings.stage == "joint" and self.step >= settings.bypass_steps
        statistics = self.trainer.statistics(quantized) if learns_codes else None
        self._sum_over_ranks([*gradients, statistics] if learns_codes else gradients)
        for gradient in gradients:
            gradient.div_(self.world)
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm)
        rate = learning_rate(
            settings.peak_rate,
            self.step,
            self.budget.progress(self.step),
            settings.warmup_steps,
            settings.rate_floor,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if learns_codes:
            self.trainer.update(statistics)
            if self.step % settings.restart_every == 0:
                self.trainer.restart_dead(quantized)
                self._share_codebooks()
        self.step += 1
        return {name: float(part.detach()) for name, part in parts.items()}, float(norm)

    def _start_codebooks(self) -> None:
        if not self.collected:  # resumed between collecting and starting
            for step in range(100):
                with torch.no_grad():
                    latents = encode_latents(
                        self.model, self.sampler.batch(step)[0].to(self.device)
                    )
                self.collected.append(latents.float().transpose(1, 2).flatten(0, 1))
        self.trainer.start(torch.cat(self.collected), self.settings.crops.batch_frames * self.world)
        self.collected = []
        self._share_codebooks()

    def _share_codebooks(self) -> None:
        if self.world > 1:
            for book in self.trainer.books:
                dist.broadcast(book.embed_sum, 0)
                dist.broadcast(book.cluster_usage, 0)
                book._embed = None

    @torch.no_grad()
    def evaluate(self, num_clips: int = 20) -> dict:
        """Return the mel distance on held-out clips and each codebook's perplexity."""
        clips = read_clips(self.settings.work_dir, "held_out")
        clips = clips[:: max(1, len(clips) // num_clips)]
        distances, all_codes = [], []
        for clip in clips:
            samples = torch.from_numpy(clip_samples(self.sampler.audio, clip)).to(self.device)
            num_frames = len(samples) // SAMPLES_PER_FRAME
            samples = samples[None, : num_frames * SAMPLES_PER_FRAME]
            with autocast(self.device, self.settings.bfloat16):
                latents = encode_latents(self.model, samples).float()
                full = torch.tensor([7], device=self.device)
                quantized = self.trainer(latents, full, self.step < self.settings.bypass_steps)
                output = decode_latents(self.model, quantized.latents)
            distances.append(float(self.mel_loss(output.float(), samples)[0]))
            all_codes.append(quantized.codes)
        perplexities = []
        for codes in torch.cat(all_codes, dim=1):
            share = torch.bincount(codes, minlength=512).float() / len(codes)
            perplexities.append(round(float(torch.exp(-(share * (share + 1e-9).log()).sum())), 1))
        return {"held_out_mel": float(np.mean(distances)), "perplexity": perplexities}

    def save(self) -> None:
        """Write the run's checkpoint (first process only)."""
        if self.rank == 0:
            state = {
                "model": self.model.state_dict(),
                "distil": self.distil.state_dict(),
                "optimizer": copy.deepcopy(self.optimizer.state_dict()),
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
            parts, norm = self.train_step()
            parts["norm"] = norm
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value
            count += 1
            done = self._agree(self.budget.progress(self.step) >= 1.0)
            if self.rank == 0 and (self.step % 100 == 0 or done):
                means = {name: value / count for name, value in sums.items()}
                rate = self.optimizer.param_groups[0]["lr"]
                self.log.write(
                    step=self.step, elapsed_s=self.budget.elapsed_s, rate=rate * 1e3, **means
                )
                sums, count = {}, 0
            if self.rank == 0 and (self.step % self.settings.evaluate_every == 0 or done):
                self.log.write(step=self.step, elapsed_s=self.budget.elapsed_s, **self.evaluate())
            if self.step % self.settings.save_every == 0 or done:
                self.save()
        if self.world > 1:
            dist.destroy_process_group()

    def _agree(self, done: bool) -> bool:
        """Let the first process decide for all, checking every 20 steps."""
        if self.world == 1:
            return done
        if self.step % 20:
            return False
        flag = torch.tensor(float(done), device=self.device)
        dist.broadcast(flag, 0)
        return bool(flag)


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["joint", "decoder"])
    parser.add_argument("--work-dir", type=Path, required=True)
    for name in ("minutes", "steps", "peak_rate", "bypass_steps", "save_every"):
        default = getattr(CodecSettings, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    for name in ("batch_frames", "seed"):
        default = getattr(CropSettings, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = vars(parser.parse_args())
    crops = CropSettings(batch_frames=options.pop("batch_frames"), seed=options.pop("seed"))
    settings = CodecSettings(**options, crops=crops)
    CodecTrainer(settings).run()


if __name__ == "__main__":
    main()
