"""The demo voice's language model: CSM with HF parameter names, and its loss.

The maths is that of transformers' `CsmForConditionalGeneration` (half-split rotary embedding with
llama3 scaling, RMS norms, grouped queries); only what training needs is here, so it is small and
runs without caches. README.md says how it was compared with transformers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CsmConfig, CsmDepthDecoderConfig, MimiConfig

from codec_model import NUM_BOOKS

GUIDED_LAYER, GUIDED_HEADS = 3, 2  # of the backbone; see `Guide`
AUDIO_VOCAB_SIZE = 512 + 3


def csm_config(text_vocab_size: int, codec: MimiConfig) -> CsmConfig:
    """Return the shape of the language model; the rotary frequencies are those of CSM-1B."""
    depth = CsmDepthDecoderConfig(
        num_codebooks=NUM_BOOKS,
        backbone_hidden_size=256,
        vocab_size=AUDIO_VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=NUM_BOOKS + 1,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 2.0**-9,
            "high_freq_factor": 2.0**-7,
            "original_max_position_embeddings": 16,
        },
    )
    return CsmConfig(
        num_codebooks=NUM_BOOKS,
        vocab_size=AUDIO_VOCAB_SIZE,
        text_vocab_size=text_vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 0.125,
            "high_freq_factor": 0.5,
            "original_max_position_embeddings": 1024,
        },
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=text_vocab_size - 2,  # unused rows kept for transformers' placeholders
        audio_token_id=text_vocab_size - 2,
        audio_eos_token_id=text_vocab_size - 1,
        codebook_eos_token_id=0,
        codebook_pad_token_id=AUDIO_VOCAB_SIZE - 1,
        depth_decoder_config=depth.to_dict(),
        codec_config=codec.to_dict(),
    )


def rotary_table(config: CsmConfig | CsmDepthDecoderConfig, num_positions: int) -> Tensor:
    """Return cosines and sines, (2, P, head_dim), with the scaling of Llama 3.1."""
    rope = config.rope_parameters
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = rope["rope_theta"] ** -exponents
    original = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (original * frequencies / (2.0 * math.pi) - low) / (high - low)
    smooth = smooth.clamp(0.0, 1.0)  # 0 for long waves, 1 for short ones
    frequencies = frequencies * (smooth + (1.0 - smooth) / rope["factor"])
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float64), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return torch.stack([angles.cos(), angles.sin()]).float()


class Guide:
    """Draws some heads of one layer to the place in the text that is being spoken.

    Which letters a frame speaks is the hardest thing for a small model to find out by itself.

    Args:
        bells: (B, T, T) float32, see `frames.alignment`.
    """

    def __init__(self, bells: Tensor) -> None:
        self.bells = bells
        self.loss = bells.new_zeros(())

    def compare(self, query: Tensor, key: Tensor) -> None:
        """Set `loss`: mean negative log of the attention inside the bells, (B, heads, T, d)."""
        query, key = query[:, :GUIDED_HEADS].float(), key[:, :GUIDED_HEADS].float()
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        length = scores.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        inside = (weights * self.bells[:, None]).sum(-1)  # (B, heads, T)
        speaks = self.bells.amax(-1)[:, None] > 0.0
        penalty = -(inside + 1e-4).log() * speaks
        self.loss = penalty.sum() / (speaks.sum() * GUIDED_HEADS)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: CsmConfig | CsmDepthDecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, guide: Guide | None = None) -> Tensor:
        """Attend within (B, T, D); `rotary` is (2, T, head_dim)."""
        shape = (*x.shape[:2], -1, self.head_dim)
        query, key, value = (
            projection(x).view(shape).transpose(1, 2)  # (B, heads, T, head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cosine, sine = rotary.to(query.dtype)
        query, key = (
            part * cosine + torch.cat([-part.chunk(2, -1)[1], part.chunk(2, -1)[0]], -1) * sine
            for part in (query, key)
        )
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        if guide is not None:
            guide.compare(query, key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, config: CsmConfig | CsmDepthDecoderConfig, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotary: Tensor, guide: Guide | None = None) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotary, guide))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Llama(nn.Module):
    """A stack of layers with a final norm."""

    def __init__(self, config: CsmConfig | CsmDepthDecoderConfig, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        table = rotary_table(config, config.max_position_embeddings)
        self.register_buffer("rotary", table, persistent=False)

    def forward(self, x: Tensor, guide: Guide | None = None) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        rotary = self.rotary[:, : x.shape[1]]
        for number, layer in enumerate(self.layers):
            x = layer(x, rotary, guide if number == GUIDED_LAYER else None)
        return self.norm(x)


class DepthModel(Llama):
    """The depth decoder's stack with the table of audio embeddings, which the backbone shares."""

    def __init__(self, config: CsmDepthDecoderConfig, dropout: float) -> None:
        super().__init__(config, dropout)
        width = config.backbone_hidden_size
        self.embed_tokens = nn.Embedding(config.num_codebooks * config.vocab_size, width)
        self.inputs_embeds_projector = nn.Linear(width, config.hidden_size, bias=False)


class DepthDecoder(nn.Module):
    """The depth decoder with one output matrix per codebook after the first."""

    def __init__(self, config: CsmDepthDecoderConfig, dropout: float) -> None:
        super().__init__()
        self.model = DepthModel(config, dropout)
        self.codebooks_head = nn.Module()
        shape = (config.num_codebooks - 1, config.hidden_size, config.vocab_size)
        self.codebooks_head.weight = nn.Parameter(torch.empty(shape))


class Csm(nn.Module):
    """Backbone over frames, depth decoder over the codebooks of one frame."""

    def __init__(self, config: CsmConfig, dropout: float = 0.0) -> None:
        super().__init__()
        depth_config = config.depth_decoder_config
        self.vocab_size, self.num_codebooks = config.vocab_size, config.num_codebooks
        self.embed_text_tokens = nn.Embedding(config.text_vocab_size, config.hidden_size)
        self.backbone_model = Llama(config, dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.depth_decoder = DepthDecoder(depth_config, dropout)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                layers = (config if "backbone" in name else depth_config).num_hidden_layers
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if out else 0.02)
        nn.init.normal_(self.depth_decoder.model.inputs_embeds_projector.weight, std=0.06)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Return embeddings of codes of books 0, 1, ..., (..., n) -> (..., n, D)."""
        books = torch.arange(codes.shape[-1], device=codes.device) * self.vocab_size
        return self.depth_decoder.model.embed_tokens(codes + books)

    def hidden_states(self, tokens: Tensor, mask: Tensor, guide: Guide | None = None) -> Tensor:
        """Run the backbone.

        Args:
            tokens: (B, T, K + 1) int64, the last column is text.
            mask: (B, T, K + 1) bool, which columns a position has.
            guide: has its loss set.

        Returns:
            (B, T, D), after the final norm; position t predicts frame t + 1.
        """
        parts = torch.cat(
            [self.embed_codes(tokens[..., :-1]), self.embed_text_tokens(tokens[..., -1:])], dim=2
        )
        return self.backbone_model((parts * mask[..., None]).sum(2), guide)

    def depth_logits(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Return logits of the next codebooks.

        Args:
            hidden: (N, D), the backbone's state before the frame.
            codes: (N, n) int64, the first n codes of the frame, 1 <= n < K.

        Returns:
            (N, n, V); entry i - 1 is for codebook i.
        """
        model = self.depth_decoder.model
        inputs = torch.cat([hidden[:, None], self.embed_codes(codes).to(hidden.dtype)], dim=1)
        states = model(model.inputs_embeds_projector(inputs))[:, 1:]  # (N, n, D)
        weights = self.depth_decoder.codebooks_head.weight[: codes.shape[1]]
        return torch.einsum("nid,idv->niv", states, weights.to(states.dtype))

    def losses(
        self,
        tokens: Tensor,
        mask: Tensor,
        depth_share: float = 1.0,
        seen: Tensor | None = None,
        guide: Guide | None = None,
    ) -> Tensor:
        """Return the mean cross entropy of each codebook, (K,).

        Args:
            tokens: (B, T, K + 1) int64.
            mask: (B, T, K + 1) bool; the positions t >= 1 with audio are the targets.
            depth_share: the part of them, drawn at random, on which the depth decoder runs.
            seen: (B, T, K + 1) bool, what the backbone is fed where that is less than `mask`.
            guide: has its loss set.
        """
        hidden = self.hidden_states(tokens, mask if seen is None else seen, guide)
        batch, position = mask[:, 1:, 0].nonzero(as_tuple=True)
        before = hidden[batch, position]  # (N, D), the state at t - 1
        frames = tokens[batch, position + 1, :-1]  # (N, K)
        first = F.cross_entropy(self.lm_head(before).float(), frames[:, 0])
        if depth_share < 1.0:
            count = max(1, round(depth_share * len(frames)))
            chosen = torch.randperm(len(frames), device=frames.device)[:count]
            before, frames = before[chosen], frames[chosen]
        logits = self.depth_logits(before, frames[:, :-1]).float()
        rest = F.cross_entropy(logits.transpose(1, 2), frames[:, 1:], reduction="none").mean(0)
        return torch.cat([first[None], rest])
