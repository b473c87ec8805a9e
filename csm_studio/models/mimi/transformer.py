"""Mimi's causal transformer with an attention window, offline and streaming."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import mlx.nn as nn

from csm_studio.configs import MimiConfig


@dataclasses.dataclass
class WindowState:
    """The past of one attention layer in a stream.

    Attributes:
        keys: The last keys (B, H, <= window - 1, head_dim), rotated; None at the start.
        values: Their values.
        offset: Steps seen so far.
    """

    keys: mx.array | None = None
    values: mx.array | None = None
    offset: int = 0


class WindowAttention(nn.Module):
    """Causal self-attention over the last `sliding_window` steps, itself included."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.window = config.sliding_window
        self.rope_theta = config.rope_theta
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def __call__(self, x: mx.array, state: WindowState | None = None) -> mx.array:
        """Map (B, T, D) to (B, T, D)."""
        offset = state.offset if state is not None else 0
        queries = self._rotate(self._heads(self.q_proj(x)), offset)
        keys = self._rotate(self._heads(self.k_proj(x)), offset)
        values = self._heads(self.v_proj(x))
        if state is not None:
            if state.keys is not None and state.values is not None:
                keys = mx.concatenate([state.keys, keys], axis=2)
                values = mx.concatenate([state.values, values], axis=2)
            kept = max(keys.shape[2] - (self.window - 1), 0)
            state.keys, state.values = keys[:, :, kept:], values[:, :, kept:]
            state.offset = offset + x.shape[1]
        y = self._attend(queries, keys, values)
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(x.shape))

    def _attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Attend in blocks of queries, so that memory grows with T and not with its square."""
        num_queries, num_keys = queries.shape[2], keys.shape[2]
        past = num_keys - num_queries
        parts = []
        for start in range(0, num_queries, self.window):
            end = min(start + self.window, num_queries)
            first = max(past + start - (self.window - 1), 0)
            last = past + end
            query_at = mx.arange(past + start, last)[:, None]
            key_at = mx.arange(first, last)[None]
            mask = (key_at <= query_at) & (key_at > query_at - self.window)
            parts.append(
                mx.fast.scaled_dot_product_attention(
                    queries[:, :, start:end],
                    keys[:, :, first:last],
                    values[:, :, first:last],
                    scale=queries.shape[-1] ** -0.5,
                    mask=mask,
                )
            )
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(0, 2, 1, 3)

    def _rotate(self, x: mx.array, offset: int) -> mx.array:
        return mx.fast.rope(
            x, x.shape[-1], traditional=True, base=self.rope_theta, scale=1.0, offset=offset
        )


class LayerScale(nn.Module):
    """A learnt factor per channel on a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = mx.full((width,), 0.01)

    def __call__(self, x: mx.array) -> mx.array:
        """Scale (..., D)."""
        return x * self.scale


class FeedForward(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., D) to (..., D)."""
        return self.fc2(nn.gelu(self.fc1(x)))


class TransformerLayer(nn.Module):
    """Pre-norm attention and feed-forward, each scaled and added."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = WindowAttention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = nn.LayerNorm(width, eps=config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(width, eps=config.norm_eps)
        self.self_attn_layer_scale = LayerScale(width)
        self.mlp_layer_scale = LayerScale(width)

    def __call__(self, x: mx.array, state: WindowState | None = None) -> mx.array:
        """Map (B, T, D) to (B, T, D)."""
        x = x + self.self_attn_layer_scale(self.self_attn(self.input_layernorm(x), state))
        return x + self.mlp_layer_scale(self.mlp(self.post_attention_layernorm(x)))


class MimiTransformer(nn.Module):
    """The transformer on either side of the quantizer, at 25 steps per second."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        self.layers = [TransformerLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: mx.array, states: list[WindowState] | None = None) -> mx.array:
        """Map (B, T, D) to (B, T, D)."""
        for index, layer in enumerate(self.layers):
            x = layer(x, states[index] if states is not None else None)
        return x

    def make_states(self) -> list[WindowState]:
        """Return an empty streaming state for each layer."""
        return [WindowState() for _ in self.layers]
