"""The codec's spectral loss."""

import torch
from torch import Tensor, nn

from features import mel_filters


class RealFourier(torch.autograd.Function):
    """`torch.fft.rfft` whose backward pass is a real transform too: PyTorch's own is complex."""

    @staticmethod
    def forward(ctx: object, frames: Tensor) -> Tensor:
        """Transform real frames (..., N) to (..., N / 2 + 1, 2), real and imaginary parts."""
        ctx.size = frames.shape[-1]
        return torch.view_as_real(torch.fft.rfft(frames))

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        """Apply the adjoint, (..., N / 2 + 1, 2) to (..., N)."""
        gradient = gradient.clone()
        gradient[..., 1:-1, :] *= 0.5  # irfft counts every bin but the first and last twice
        return torch.fft.irfft(torch.view_as_complex(gradient), n=ctx.size, norm="forward")


class MelLoss(nn.Module):
    """Distance of two waveforms in log-mel spectra of four resolutions."""

    SCALES = ((2048, 128), (1024, 80), (512, 40), (256, 20))  # FFT length, mel bands
    FLOOR = 1e-2  # of a mel magnitude, about -80 dB of full scale

    def __init__(self) -> None:
        super().__init__()
        for num_fft, num_mels in self.SCALES:
            filters = torch.from_numpy(mel_filters(num_fft, num_mels))
            self.register_buffer(f"filters_{num_fft}", filters)
            self.register_buffer(f"window_{num_fft}", torch.hann_window(num_fft))

    def mel(self, waveform: Tensor, num_fft: int) -> Tensor:
        """Return mel magnitudes of waveforms, (B, S) -> (B, frames, mels)."""
        frames = waveform.unfold(1, num_fft, num_fft // 4)  # (B, frames, N)
        parts = RealFourier.apply(frames * getattr(self, f"window_{num_fft}"))
        magnitude = (parts.square().sum(-1) + 1e-9).sqrt()
        return magnitude @ getattr(self, f"filters_{num_fft}")

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return (log10-mel L1, spectral convergence), means over scales, of (B, S) waveforms."""
        distance = convergence = 0.0
        for num_fft, _ in self.SCALES:
            ours = self.mel(output, num_fft)
            with torch.no_grad():
                theirs = self.mel(target, num_fft)
            logs = [mel.clamp(min=self.FLOOR).log10() for mel in (ours, theirs)]
            distance = distance + (logs[0] - logs[1]).abs().mean()
            norm = ((ours - theirs).square().sum((1, 2)) + 1e-6).sqrt()
            convergence = convergence + (norm / (theirs.square().sum((1, 2)).sqrt() + 3.0)).mean()
        return distance / len(self.SCALES), convergence / len(self.SCALES)
