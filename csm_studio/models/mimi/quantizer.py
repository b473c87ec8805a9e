"""Mimi's split residual vector quantizer: a semantic branch and an acoustic one."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from csm_studio.configs import MimiConfig


class ResidualQuantizer(nn.Module):
    """Codebooks that each quantize what the ones before left over.

    Args:
        width: D of the latents.
        num_codebooks: N.
        codebook_size: Entries per codebook.
        codebook_dim: Width of an entry.
    """

    def __init__(
        self, width: int, num_codebooks: int, codebook_size: int, codebook_dim: int
    ) -> None:
        super().__init__()
        self.input_proj = nn.Linear(width, codebook_dim, bias=False)
        self.output_proj = nn.Linear(codebook_dim, width, bias=False)
        self.codebooks = mx.random.normal((num_codebooks, codebook_size, codebook_dim))

    def encode(self, x: mx.array) -> mx.array:
        """Map latents (B, T, D) to int32 codes (B, N, T)."""
        residual = self.input_proj(x)
        codes = []
        for codebook in self.codebooks:
            # Nearest entry: |r - e|^2 without |r|^2, which is the same for every entry.
            distances = (codebook * codebook).sum(-1) - 2 * (residual @ codebook.T)
            nearest = mx.argmin(distances, axis=-1)
            residual = residual - codebook[nearest]
            codes.append(nearest)
        return mx.stack(codes, axis=1).astype(mx.int32)

    def decode(self, codes: mx.array) -> mx.array:
        """Map codes (B, n, T), n <= N, to latents (B, T, D)."""
        total = self.codebooks[0][codes[:, 0]]
        for index in range(1, codes.shape[1]):
            total = total + self.codebooks[index][codes[:, index]]
        return self.output_proj(total)


class SplitQuantizer(nn.Module):
    """Semantic and acoustic branches over the same latents, their codes in one stack."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        size, dim, width = config.codebook_size, config.codebook_dim, config.hidden_size
        self.num_semantic = config.num_semantic_quantizers
        num_acoustic = config.num_quantizers - self.num_semantic
        self.semantic = ResidualQuantizer(width, self.num_semantic, size, dim)
        self.acoustic = ResidualQuantizer(width, num_acoustic, size, dim)

    def encode(self, x: mx.array) -> mx.array:
        """Map latents (B, T, D) to int32 codes (B, K, T)."""
        return mx.concatenate([self.semantic.encode(x), self.acoustic.encode(x)], axis=1)

    def decode(self, codes: mx.array) -> mx.array:
        """Map codes (B, K, T) to latents (B, T, D)."""
        semantic = self.semantic.decode(codes[:, : self.num_semantic])
        if codes.shape[1] == self.num_semantic:
            return semantic
        return semantic + self.acoustic.decode(codes[:, self.num_semantic :])
