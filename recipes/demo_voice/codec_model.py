"""The demo voice's codec: transformers' Mimi modules with what training needs around them.

`MimiModel` defines the computation (causal convolutions, causal windowed attention, split
residual quantizer) and the weight layout; it has no training of its own. This module adds the
initialisation, the codebooks' moving averages and the straight-through quantizer.

Sources: Defossez et al. 2024 (Moshi, sec. 3.3: split quantizer, distilled first codebook);
Zeghidour et al. 2021 (SoundStream: k-means start, dead codes).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import MimiConfig, MimiModel
from transformers.models.mimi.modeling_mimi import (
    MimiConv1d,
    MimiEuclideanCodebook,
    MimiResnetBlock,
)

MOST_BOOKS = 12  # trained
NUM_BOOKS = 8  # used: the fewest that keep the words (README.md has the figures)


def codec_config(num_books: int = MOST_BOOKS) -> MimiConfig:
    """Return the shape of the codec: one semantic and some acoustic codebooks of 512, 12.5 Hz."""
    return MimiConfig(
        num_filters=24,
        hidden_size=256,
        upsampling_ratios=[6, 5, 4, 8],
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1024,
        sliding_window=64,
        layer_scale_initial_scale=0.1,
        num_quantizers=num_books,
        codebook_size=512,
        codebook_dim=128,
        vector_quantization_hidden_dimension=128,
        upsample_groups=256,
        attn_implementation="sdpa",
    )


@torch.no_grad()
def initialise(model: MimiModel) -> None:
    """Give every layer about unit gain; with PyTorch's defaults training stays at a constant."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Conv1d):
            nn.init.normal_(module.weight, std=1.2 * module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.ConvTranspose1d):
            taps = module.kernel_size[0] / module.stride[0]  # that reach one output sample
            fan_in = module.in_channels / module.groups * taps
            nn.init.normal_(module.weight, std=1.2 * fan_in**-0.5)
        if getattr(module, "bias", None) is not None and not isinstance(module, nn.LayerNorm):
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, MimiResnetBlock):
            convolutions = [layer for layer in module.block if isinstance(layer, MimiConv1d)]
            convolutions[-1].conv.weight.mul_(0.5)
    model.encoder.encoder_seanet.layers[0].conv.weight.mul_(8.0)
    model.decoder.decoder_seanet.layers[-1].conv.weight.mul_(0.1)
    model.decoder.upsample.conv.weight.fill_(0.5)


@torch.no_grad()
def round_as_shipped(model: MimiModel) -> None:
    """Round every tensor to float16 and divide the codebooks out, as the exported file has them.

    The corpus is encoded with the rounded weights, so its codes are those a user's copy gives.
    """
    for module in model.modules():
        if isinstance(module, MimiEuclideanCodebook):
            module.embed_sum.copy_(module.embed_sum / module.cluster_usage.clamp(min=1e-5)[:, None])
            module.cluster_usage.fill_(1.0)
            module.initialized.fill_(1.0)
            module._embed = None  # the cached quotient
    for name, tensor in model.state_dict().items():
        if "cluster_usage" not in name:
            tensor.copy_(tensor.half().float())


def hear(model: MimiModel, waveform: Tensor) -> Tensor:
    """Run the encoder's convolutions, (B, S) -> (B, S / 960, D)."""
    return model.encoder.encoder_seanet(waveform[:, None]).transpose(1, 2)


def compress(model: MimiModel, features: Tensor) -> Tensor:
    """Return the latents before the quantizer, (B, 2 T, D) -> (B, D, T)."""
    hidden = model.encoder.encoder_transformer(features).last_hidden_state
    return model.encoder.downsample(hidden.transpose(1, 2))


def expand(model: MimiModel, latents: Tensor) -> Tensor:
    """Return the features that the decoder's convolutions sound, (B, D, T) -> (B, 2 T, D)."""
    hidden = model.decoder.upsample(latents)
    return model.decoder.decoder_transformer(hidden.transpose(1, 2)).last_hidden_state


def sound(model: MimiModel, features: Tensor) -> Tensor:
    """Run the decoder's convolutions, (B, T, D) -> (B, 960 T)."""
    return model.decoder.decoder_seanet(features.transpose(1, 2))[:, 0]


@dataclass(frozen=True)
class Quantized:
    """What the quantizer returns in training.

    Attributes:
        latents: (B, D, T), with straight-through gradients.
        semantic: first codebook's vectors, (B, d, T), with straight-through gradients.
        commitment: scalar, mean squared distance to the chosen entries.
        codes: (K, B * T), -1 where a level was dropped.
        inputs: (K, B * T, d), what each level quantized; detached.
    """

    latents: Tensor
    semantic: Tensor
    commitment: Tensor
    codes: Tensor
    inputs: Tensor


class QuantizerTrainer:
    """Trains the codebooks of a `MimiModel` in place by exponential moving averages."""

    def __init__(self, model: MimiModel, decay: float = 0.99) -> None:
        quantizer = model.quantizer
        self.semantic = quantizer.semantic_residual_vector_quantizer
        self.acoustic = quantizer.acoustic_residual_vector_quantizer
        self.books = [layer.codebook for q in (self.semantic, self.acoustic) for layer in q.layers]
        self.decay = decay

    def entries(self, level: int) -> Tensor:
        """Return one codebook, (V, d)."""
        book = self.books[level]
        return book.embed_sum / book.cluster_usage.clamp(min=book.epsilon)[:, None]

    def nearest(self, level: int, vectors: Tensor) -> Tensor:
        """Return the index of the nearest entry, (N, d) -> (N,)."""
        table = self.entries(level)
        return (table.square().sum(1) - 2.0 * vectors @ table.T).argmin(dim=1)

    def __call__(self, latents: Tensor, num_acoustic: Tensor, bypass: bool = False) -> Quantized:
        """Quantize latents.

        Args:
            latents: (B, D, T).
            num_acoustic: (B,) int64, how many acoustic codebooks each item uses.
            bypass: pass the projected latents on unquantized (the first steps of training).
        """
        num_items, _, num_frames = latents.shape
        outputs, codes, inputs, commitment = [], [], [], latents.new_zeros((), dtype=torch.float32)
        semantic = None
        for quantizer, first in ((self.semantic, 0), (self.acoustic, 1)):
            projected = quantizer.input_proj(latents).float()  # (B, d, T)
            residual = projected.transpose(1, 2).reshape(-1, projected.shape[1])
            total = torch.zeros_like(residual)
            for level in range(first, first + len(quantizer.layers)):
                used = torch.ones(num_items, dtype=torch.bool, device=latents.device)
                if first:
                    used = num_acoustic >= level
                used = used.repeat_interleave(num_frames)
                with torch.no_grad():
                    code = self.nearest(level, residual)
                    entry = self.entries(level)[code]
                inputs.append(residual.detach())
                codes.append(torch.where(used, code, -1))
                commitment = commitment + ((residual - entry).square().mean(1) * used).mean()
                total = total + entry * used[:, None]
                residual = residual - entry
            total = total.reshape(num_items, num_frames, -1).transpose(1, 2)
            straight = projected if bypass else projected + (total - projected).detach()
            if first == 0:
                semantic = straight
            outputs.append(quantizer.output_proj(straight))
        if bypass:
            commitment = commitment * 0.0
        return Quantized(
            outputs[0] + outputs[1],
            semantic,
            commitment / len(self.books),
            torch.stack(codes),
            torch.stack(inputs),
        )

    @torch.no_grad()
    def statistics(self, quantized: Quantized) -> Tensor:
        """Return counts and sums per entry, (K, V, 1 + d): what the moving averages take in."""
        num_books, num_vectors, width = quantized.inputs.shape
        size = self.books[0].codebook_size
        padded = torch.cat(
            [quantized.inputs.new_ones(num_books, num_vectors, 1), quantized.inputs], 2
        )
        result = padded.new_zeros(num_books, size + 1, 1 + width)
        index = (quantized.codes % (size + 1))[..., None].expand_as(padded)  # -1 -> spare last row
        return result.scatter_add_(1, index, padded)[:, :size]

    @torch.no_grad()
    def update(self, statistics: Tensor) -> None:
        """Move every codebook towards the batch's statistics (K, V, 1 + d)."""
        for book, values in zip(self.books, statistics, strict=True):
            book.cluster_usage.lerp_(values[:, 0], 1.0 - self.decay)
            book.embed_sum.lerp_(values[:, 1:], 1.0 - self.decay)
            book._embed = None  # MimiEuclideanCodebook caches the quotient

    @torch.no_grad()
    def restart_dead(self, quantized: Quantized, share: float = 0.05, most: int = 16) -> int:
        """Put entries used less than `share` of the mean onto vectors of the batch."""
        restarted = 0
        for book, vectors in zip(self.books, quantized.inputs, strict=True):
            mean = book.cluster_usage.mean()
            dead = (book.cluster_usage < share * mean).nonzero()[:most, 0]
            chosen = vectors[torch.randperm(len(vectors), device=vectors.device)[: len(dead)]]
            dead = dead[: len(chosen)]
            book.cluster_usage[dead] = 0.5 * mean
            book.embed_sum[dead] = chosen * 0.5 * mean
            book._embed = None
            restarted += len(dead)
        return restarted

    @torch.no_grad()
    def start(self, latents: Tensor, vectors_per_step: int, iterations: int = 12) -> None:
        """Set all codebooks by k-means on collected latents (N, D)."""
        for quantizer, first in ((self.semantic, 0), (self.acoustic, 1)):
            residual = quantizer.input_proj(latents.T[None])[0].T.float()  # (N, d)
            for level in range(first, first + len(quantizer.layers)):
                book = self.books[level]
                count = max(len(residual), book.codebook_size)
                order = torch.randperm(count, device=residual.device) % len(residual)
                book.embed_sum.copy_(residual[order[: book.codebook_size]])
                book.cluster_usage.fill_(1.0)
                for _ in range(iterations):
                    codes = self.nearest(level, residual)
                    counts = torch.bincount(codes, minlength=book.codebook_size).float()
                    sums = torch.zeros_like(book.embed_sum).index_add_(0, codes, residual)
                    lonely = (counts == 0).nonzero()[:, 0]
                    picks = torch.randint(len(residual), (len(lonely),), device=residual.device)
                    sums[lonely], counts[lonely] = residual[picks], 1.0
                    book.embed_sum.copy_(sums)
                    book.cluster_usage.copy_(counts)
                residual = residual - self.entries(level)[self.nearest(level, residual)]
                scale = vectors_per_step / len(residual)  # usage as the moving average counts it
                book.embed_sum.mul_(scale)
                book.cluster_usage.mul_(scale)
                book._embed = None
