"""Stage 4: encode the corpus with the frozen codec, and train the language model on the codes.

    python language_model.py encode --work-dir W [--heard]
    python language_model.py train  --work-dir W --minutes 90

`encode` needs the codec's `inner`, with `--heard` its `encoder` too. Codes made without it are the
same but for the encoder's errors: train on them while the encoder trains, then encode again.
`train` resumes from its last checkpoint.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from codec_model import NUM_BOOKS, codec_config
from common import (
    Budget,
    TrainingLog,
    autocast,
    learning_rate,
    load_checkpoint,
    pick_device,
    save_checkpoint,
)
from csm_model import Csm, Guide, csm_config
from frames import Corpus, collate, encode_corpus, sequence
from text import text_vocab_size


@dataclass
class LanguageModelSettings:
    """Settings of one run."""

    work_dir: Path
    minutes: float = 45.0  # budget over all sessions of the run
    steps: int = 100_000
    peak_rate: float = 1.5e-3
    rate_floor: float = 0.03
    warmup_steps: int = 100
    clip_norm: float = 1.0
    weight_decay: float = 0.02
    dropout: float = 0.05
    batch_positions: int = 1_200  # text and audio positions of a step, padding included
    depth_share: float = 0.25  # of the frames, on which the depth decoder trains
    joined_share: float = 0.2  # sequences of two or three turns of one speaker
    guide_weight: float = 0.1  # of the alignment of attention; see csm_model.Guide
    frame_drop: float = 0.2  # input frames whose codes are hidden, so that the text is used
    evaluate_every: int = 500
    save_every: int = 200
    seed: int = 2
    bfloat16: bool = True


class LanguageModelTrainer:
    """A training run."""

    def __init__(self, settings: LanguageModelSettings) -> None:
        self.settings, self.device = settings, pick_device()
        torch.manual_seed(settings.seed)
        self.corpus = Corpus(
            settings.work_dir, settings.batch_positions, settings.joined_share, settings.seed
        )
        vocabulary = text_vocab_size(self.corpus.tokenizer)
        self.model = Csm(csm_config(vocabulary, codec_config(NUM_BOOKS)), settings.dropout).to(
            self.device
        )
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.peak_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.directory = settings.work_dir / "lm"
        self.log = TrainingLog(self.directory / "train.jsonl")
        self.step, self.epoch, self.position, elapsed_s = 0, 0, 0, 0.0
        state = load_checkpoint(self.directory / "train.pt", self.device)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"].cpu())
            self.step, self.epoch, self.position = state["step"], state["epoch"], state["position"]
            elapsed_s = state["elapsed_s"]
        self.budget = Budget(settings.steps, settings.minutes, elapsed_s)

    def save(self) -> None:
        """Write the run's checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "elapsed_s": self.budget.elapsed_s,
            "settings": {k: str(v) for k, v in asdict(self.settings).items()},
        }
        save_checkpoint(self.directory / "train.pt", state)

    def train_step(self, batch: list[np.ndarray]) -> Tensor:
        """Take one step; return the loss of each codebook and of the alignment, (K + 1,)."""
        settings = self.settings
        tokens, mask, bells = (part.to(self.device) for part in collate(batch))
        guide = Guide(bells)
        seen = mask.clone()
        if settings.frame_drop:
            dropped = torch.rand(mask.shape[:2], device=self.device) < settings.frame_drop
            seen[..., :-1] &= ~dropped[..., None]
        with autocast(self.device, settings.bfloat16):
            losses = self.model.losses(tokens, mask, settings.depth_share, seen, guide)
        self.optimizer.zero_grad()
        loss = losses[0] + losses[1:].mean() + settings.guide_weight * guide.loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        progress = self.budget.progress(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(
                settings.peak_rate, self.step, progress, settings.warmup_steps, settings.rate_floor
            )
        self.optimizer.step()
        self.step += 1
        return torch.cat([losses, guide.loss[None]]).detach()

    @torch.no_grad()
    def evaluate(self) -> list[float]:
        """Return the held-out loss of each codebook, weighted by clips of one batch of ten."""
        self.model.eval()
        results = []
        clips = sorted(self.corpus.held_out, key=lambda pair: pair[1].length)
        for first in range(0, len(clips), 10):
            batch = [sequence([self.corpus.turn(*pair)]) for pair in clips[first : first + 10]]
            tokens, mask, _ = (part.to(self.device) for part in collate(batch))
            with autocast(self.device, self.settings.bfloat16):
                results.append(self.model.losses(tokens, mask) * mask[..., 0].sum())
            results[-1] = torch.cat([results[-1], mask[..., 0].sum()[None].float()])
        self.model.train()
        total = torch.stack(results).sum(0)
        return [round(float(value), 4) for value in total[:-1] / total[-1]]

    def run(self) -> None:
        """Train until the budget is used, logging, evaluating and saving on the way."""
        sums, count = torch.zeros(NUM_BOOKS + 1, device=self.device), 0
        batches = self.corpus.epoch(self.epoch)
        done = False
        while not done:
            if self.position >= len(batches):
                self.epoch, self.position = self.epoch + 1, 0
                batches = self.corpus.epoch(self.epoch)
            sums += self.train_step(batches[self.position])
            self.position += 1
            count += 1
            done = self.budget.progress(self.step) >= 1.0
            if self.step % 50 == 0 or done:
                means = [round(float(v), 4) for v in sums / count]
                self.log.write(
                    step=self.step,
                    epoch=self.epoch,
                    elapsed_s=self.budget.elapsed_s,
                    loss=means[0] + float(np.mean(means[1:-1])),
                    per_book=means[:-1],
                    alignment=means[-1],
                )
                sums, count = torch.zeros_like(sums), 0
            if self.step % self.settings.evaluate_every == 0 or done:
                losses = self.evaluate()
                self.log.write(
                    step=self.step, elapsed_s=self.budget.elapsed_s, held_out_per_book=losses
                )
            if self.step % self.settings.save_every == 0 or done:
                self.save()


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["encode", "train"])
    parser.add_argument("--work-dir", type=Path, required=True)
    for name in (
        "minutes",
        "steps",
        "peak_rate",
        "dropout",
        "frame_drop",
        "batch_positions",
        "depth_share",
        "seed",
    ):
        default = getattr(LanguageModelSettings, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--heard", action="store_true", help="encode what the encoder hears")
    options = vars(parser.parse_args())
    heard = options.pop("heard")
    if options.pop("command") == "encode":
        encode_corpus(options["work_dir"], heard)
    else:
        LanguageModelTrainer(LanguageModelSettings(**options)).run()


if __name__ == "__main__":
    main()
