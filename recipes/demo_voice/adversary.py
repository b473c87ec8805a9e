"""Discriminators that the decoder is tuned against, small enough for a CPU.

Sources: Kong et al. 2020 (HiFi-GAN: periods, least squares, feature matching); Defossez et al. 2022
(EnCodec: complex spectra at several resolutions).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

PERIODS = (2, 3, 5, 7, 11)
FFT_SIZES = (2048, 1024, 512)
SLOPE = 0.1
COMPRESSION = 0.3  # power that magnitudes are raised to: quiet parts of a spectrum count too


class PeriodDiscriminator(nn.Module):
    """Judges every n-th sample along with its neighbours n samples away."""

    def __init__(self, period: int, widths: tuple[int, ...] = (1, 12, 24, 48, 96)) -> None:
        super().__init__()
        self.period = period
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), (3, 1), padding=(2, 0)))
            for a, b in pairwise(widths)
        )
        self.last = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, waveform: Tensor) -> list[Tensor]:
        """Return the activations of each layer, the judgement last, of waveforms (B, S)."""
        rows = waveform.shape[1] // self.period
        x = waveform[:, : rows * self.period].reshape(len(waveform), 1, rows, self.period)
        taps = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
            taps.append(x)
        return [*taps, self.last(x)]


class SpectrumDiscriminator(nn.Module):
    """Judges a complex spectrogram."""

    def __init__(self, num_fft: int, width: int = 10) -> None:
        super().__init__()
        self.num_fft = num_fft
        self.register_buffer("window", torch.hann_window(num_fft))
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(inputs, width, (3, 9), (1, stride), padding=(1, 4)))
            for inputs, stride in ((2, 2), (width, 2), (width, 2), (width, 2))
        )
        self.last = weight_norm(nn.Conv2d(width, 1, (3, 3), padding=1))

    def forward(self, waveform: Tensor) -> list[Tensor]:
        """Return the activations of each layer, the judgement last, of waveforms (B, S)."""
        frames = waveform.unfold(1, self.num_fft, self.num_fft // 4) * self.window
        spectrum = torch.view_as_real(torch.fft.rfft(frames)) / self.num_fft**0.5
        magnitude = (spectrum.square().sum(-1, keepdim=True) + 1e-8).sqrt()
        x = (spectrum * magnitude ** (COMPRESSION - 1.0)).permute(0, 3, 1, 2)  # (B, 2, T, F)
        taps = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
            taps.append(x)
        return [*taps, self.last(x)]


class Adversary(nn.Module):
    """All discriminators."""

    def __init__(self) -> None:
        super().__init__()
        self.judges = nn.ModuleList([PeriodDiscriminator(p) for p in PERIODS])
        self.judges.extend(SpectrumDiscriminator(n) for n in FFT_SIZES)

    def own_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the least-squares loss of telling (B, S) outputs from targets."""
        loss = output.new_zeros(())
        for judge in self.judges:
            real, fake = judge(target)[-1].float(), judge(output)[-1].float()
            loss = loss + (1.0 - real).square().mean() + fake.square().mean()
        return loss / len(self.judges)

    def decoder_losses(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return (adversarial loss, feature matching) of outputs (B, S)."""
        adversarial = matching = output.new_zeros(())
        for judge in self.judges:
            with torch.no_grad():
                real = judge(target)
            fake = judge(output)
            adversarial = adversarial + (1.0 - fake[-1].float()).square().mean()
            for ours, theirs in zip(fake[:-1], real[:-1], strict=True):
                scale = theirs.float().abs().mean() + 1e-3
                matching = matching + (ours.float() - theirs.float()).abs().mean() / scale / 4.0
        return adversarial / len(self.judges), matching / len(self.judges)
