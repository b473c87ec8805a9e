"""A Llama transformer without embeddings, in MLX, with a KV cache.

Parameter names are those of the MLX checkpoint of CSM (`layers.N.self_attn.q_proj.weight` ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from csm_studio.configs import LlamaConfig

_CACHE_BLOCK = 256


def rope_periods(config: LlamaConfig) -> mx.array:
    """Return the rotary periods, llama3-scaled, as `mx.fast.rope` wants them.

    Returns:
        Float32 (head_dim / 2,): 1 / frequency, in positions per radian.

    Source: Llama 3.1 reference code; identical to HF transformers' `llama3` rope.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is not None:
        wavelengths = 2 * math.pi / frequencies
        context = scaling.original_max_position_embeddings
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
        frequencies = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    return mx.array((1.0 / frequencies).astype(np.float32))


class KVCache:
    """Keys and values of the positions seen so far, in a buffer that grows by blocks.

    Attributes:
        offset: Number of positions held.
    """

    def __init__(self, block: int = _CACHE_BLOCK) -> None:
        self.offset = 0
        self._block = block
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append new positions and return all of them.

        Args:
            keys: (B, H_kv, T_new, head_dim), already rotated.
            values: (B, H_kv, T_new, head_dim).

        Returns:
            Keys and values (B, H_kv, offset + T_new, head_dim).
        """
        end = self.offset + keys.shape[2]
        if self._keys is None or self._values is None:
            self._keys = self._empty(keys, end)
            self._values = self._empty(values, end)
        elif end > self._keys.shape[2]:
            extra = end - self._keys.shape[2]
            self._keys = mx.concatenate([self._keys, self._empty(keys, extra)], axis=2)
            self._values = mx.concatenate([self._values, self._empty(values, extra)], axis=2)
        self._keys[:, :, self.offset : end] = keys
        self._values[:, :, self.offset : end] = values
        self.offset = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def arrays(self) -> list[mx.array]:
        """Return the buffers, for `mx.eval`."""
        return [buffer for buffer in (self._keys, self._values) if buffer is not None]

    def copy(self) -> KVCache:
        """Return a cache that goes on from here without changing this one."""
        other = KVCache(self._block)
        other.offset = self.offset
        # Slice assignment rebinds an array object in place, so the copy needs objects of its own.
        other._keys = None if self._keys is None else mx.array(self._keys)
        other._values = None if self._values is None else mx.array(self._values)
        return other

    def _empty(self, like: mx.array, length: int) -> mx.array:
        rounded = -(-length // self._block) * self._block
        return mx.zeros((*like.shape[:2], rounded, like.shape[3]), dtype=like.dtype)


class Attention(nn.Module):
    """Grouped-query attention with interleaved rotary positions, causal."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, self.num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * head_dim, width, bias=False)

    def __call__(self, x: mx.array, periods: mx.array, cache: KVCache | None) -> mx.array:
        """Attend from each of x (B, T, D) to itself and what came before; returns (B, T, D)."""
        batch, length, _ = x.shape
        offset = cache.offset if cache is not None else 0
        queries = self._rotate(self._heads(self.q_proj(x), self.num_heads), periods, offset)
        keys = self._rotate(self._heads(self.k_proj(x), self.num_kv_heads), periods, offset)
        values = self._heads(self.v_proj(x), self.num_kv_heads)
        if cache is not None:
            keys, values = cache.update(keys, values)
        attended = mx.fast.scaled_dot_product_attention(
            queries,
            keys,
            values,
            scale=self.head_dim**-0.5,
            mask="causal" if length > 1 else None,
        )
        return self.o_proj(attended.transpose(0, 2, 1, 3).reshape(batch, length, -1))

    def _heads(self, x: mx.array, num_heads: int) -> mx.array:
        return x.reshape(*x.shape[:2], num_heads, self.head_dim).transpose(0, 2, 1, 3)

    def _rotate(self, x: mx.array, periods: mx.array, offset: int) -> mx.array:
        return mx.fast.rope(
            x, self.head_dim, traditional=True, base=None, scale=1.0, offset=offset, freqs=periods
        )


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., D) to (..., D)."""
        gate = self.gate_proj(x)
        return self.down_proj(gate * mx.sigmoid(gate) * self.up_proj(x))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, periods: mx.array, cache: KVCache | None = None) -> mx.array:
        """Map (B, T, D) to (B, T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), periods, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Transformer blocks and the final norm.

    Attributes:
        gradient_checkpointing: Recompute each block in the backward pass instead of keeping its
            activations: less memory, about a third more work.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.layers = [TransformerBlock(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        # The underscore keeps the constant out of parameters().
        self._periods = rope_periods(config)

    def __call__(self, x: mx.array, caches: list[KVCache] | None = None) -> mx.array:
        """Map input embeddings (B, T, D) to hidden states (B, T, D) after the final norm."""
        for index, layer in enumerate(self.layers):
            if self.gradient_checkpointing and caches is None:
                x = _checkpointed(layer, self._periods)(x)
            else:
                x = layer(x, self._periods, caches[index] if caches is not None else None)
        return self.norm(x)

    def make_caches(self, block: int = _CACHE_BLOCK) -> list[KVCache]:
        """Return an empty cache for each layer."""
        return [KVCache(block) for _ in self.layers]


def _checkpointed(layer: nn.Module, periods: mx.array) -> Callable[[mx.array], mx.array]:
    """Wrap a block so that its activations are recomputed; its parameters keep their gradients.

    `mx.checkpoint` differentiates only what is an argument, so trainable parameters are passed in.
    """

    def forward(parameters: dict, x: mx.array) -> mx.array:
        layer.update(parameters)
        return layer(x, periods)

    inner = mx.checkpoint(forward)

    def wrapped(x: mx.array) -> mx.array:
        return inner(layer.trainable_parameters(), x)

    return wrapped
