"""Weight layouts of CSM and Mimi, recognised by their keys, as rename tables.

CSM: MLX (`senstella/csm-1b-mlx`, with mlx-audio's `model.` prefix too), Sesame/torchtune and HF
transformers. Mimi: this project's own, kyutai and HF transformers (alone or inside a CSM).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx

from csm_studio.checkpoints.weights import Shapes, Weights, check_shapes, read_weights
from csm_studio.configs import CSMConfig, LlamaConfig, MimiConfig
from csm_studio.errors import WeightsError

Renames = tuple[tuple[str, str], ...]

CODEC_PREFIX = "codec_model."

_TORCHTUNE_TO_MLX: Renames = (
    (r"\.attn\.output_proj\.", ".self_attn.o_proj."),
    (r"\.attn\.([qkv])_proj\.", r".self_attn.\1_proj."),
    (r"\.mlp\.w1\.", ".mlp.gate_proj."),
    (r"\.mlp\.w2\.", ".mlp.down_proj."),
    (r"\.mlp\.w3\.", ".mlp.up_proj."),
    (r"\.sa_norm\.scale$", ".input_layernorm.weight"),
    (r"\.mlp_norm\.scale$", ".post_attention_layernorm.weight"),
    (r"\.norm\.scale$", ".norm.weight"),
)

_MLX_AUDIO_TO_MLX: Renames = ((r"^model\.", ""),)

_TRANSFORMERS_TO_MLX: Renames = (
    (r"^backbone_model\.embed_tokens\.embed_audio_tokens\.", "audio_embeddings."),
    (r"^depth_decoder\.model\.embed_tokens\.", "audio_embeddings."),
    (r"^depth_decoder\.model\.inputs_embeds_projector\.", "projection."),
    (r"^depth_decoder\.codebooks_head\.weight$", "audio_head"),
    (r"^embed_text_tokens\.", "text_embeddings."),
    (r"^lm_head\.", "codebook0_head."),
    (r"^backbone_model\.", "backbone."),
    (r"^depth_decoder\.model\.", "decoder."),
)

_CSM_LAYOUTS: tuple[tuple[str, str, Renames], ...] = (
    ("HF transformers", r"^(backbone_model|depth_decoder)\.", _TRANSFORMERS_TO_MLX),
    ("mlx-audio", r"^model\.(backbone|decoder)\.", _MLX_AUDIO_TO_MLX),
    ("Sesame/torchtune", r"^(backbone|decoder)\..*(\.attn\.|_norm\.scale)", _TORCHTUNE_TO_MLX),
    ("MLX", r"^(backbone|decoder)\.layers\.\d+\.self_attn\.", ()),
)

_KYUTAI_TO_OWN: Renames = (
    (r"^(en|de)coder\.model\.", r"\1coder.layers."),
    (r"(\.conv|\.convtr)+\.(weight|bias)$", r".\2"),
    (r"_transformer\.transformer\.", "_transformer."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.linear1\.", ".mlp.fc1."),
    (r"\.linear2\.", ".mlp.fc2."),
    (r"\.norm1\.", ".input_layernorm."),
    (r"\.norm2\.", ".post_attention_layernorm."),
    (r"\.layer_scale_1\.", ".self_attn_layer_scale."),
    (r"\.layer_scale_2\.", ".mlp_layer_scale."),
    (r"^quantizer\.rvq_first\.", "quantizer.semantic."),
    (r"^quantizer\.rvq_rest\.", "quantizer.acoustic."),
    (r"\.vq\.layers\.(\d+)\._codebook\.", r".layers.\1.codebook."),
    (r"\.embedding_sum$", ".embed_sum"),
    (r"\._initialized$", ".initialized"),
)

_TRANSFORMERS_MIMI_TO_OWN: Renames = (
    (r"\.conv\.(weight|bias)$", r".\1"),
    (r"^quantizer\.semantic_residual_vector_quantizer\.", "quantizer.semantic."),
    (r"^quantizer\.acoustic_residual_vector_quantizer\.", "quantizer.acoustic."),
)


def read_csm(path: Path, config: CSMConfig, expected: Shapes) -> Weights:
    """Read CSM weights in any known layout under the MLX names.

    Args:
        path: As in `read_weights`.
        config: The geometry, for the head counts of HF's permuted rows.
        expected: Shape of every parameter by MLX name.

    Raises:
        WeightsError: One error that lists every missing, unexpected and misshapen tensor.
    """
    weights = read_weights(path)
    named = {key: value for key, value in weights.items() if not key.startswith(CODEC_PREFIX)}
    recognised = [
        (layout, renames)
        for layout, pattern, renames in _CSM_LAYOUTS
        if any(re.search(pattern, key) for key in named)
    ]
    if not recognised:
        raise WeightsError(f"{path}: no CSM weights in it. {_sample(weights)}")
    layout, renames = recognised[0]
    if any(key.endswith(".scales") for key in named):
        raise WeightsError(f"{path}: quantized weights cannot be used. Get the bf16 or f32 model.")
    renamed = _rename(named, renames)
    if layout == "HF transformers":
        _unpermute(renamed, "backbone.", config.backbone)
        _unpermute(renamed, "decoder.", config.decoder)
    check_shapes(renamed, expected, f"{path} ({layout} layout)")
    return renamed


def read_mimi(path: Path, config: MimiConfig, expected: Shapes) -> Weights:
    """Read Mimi weights in any known layout under this project's names.

    Args:
        path: As in `read_weights`; may be a CSM in HF's layout, which holds its codec.
        config: The geometry.
        expected: Shape of every parameter by this project's name.

    Raises:
        WeightsError: One error that lists every missing, unexpected and misshapen tensor.
    """
    weights = read_weights(path)
    inside = {
        key.removeprefix(CODEC_PREFIX): value
        for key, value in weights.items()
        if key.startswith(CODEC_PREFIX)
    }
    weights = inside or weights
    if "quantizer.semantic.codebooks" in weights:
        layout, converted = "own", dict(weights)
    elif any(key.startswith("quantizer.rvq_first.") for key in weights):
        layout, converted = "kyutai", _rename(weights, _KYUTAI_TO_OWN)
        _split_in_proj(converted)
    elif any(key.startswith("quantizer.semantic_residual_vector_quantizer.") for key in weights):
        layout, converted = "HF transformers", _rename(weights, _TRANSFORMERS_MIMI_TO_OWN)
        _unpermute_rows(converted, r"_transformer\..*\.[qk]_proj\.", config.num_attention_heads)
    else:
        raise WeightsError(f"{path}: no Mimi weights in it. {_sample(weights)}")
    if layout != "own":
        _stack_codebooks(converted)
        _orient_convolutions(converted, config)
    check_shapes(converted, expected, f"{path} ({layout} layout)")
    return converted


def to_transformers_csm(weights: Weights, config: CSMConfig) -> Weights:
    """Return MLX-named CSM weights under HF transformers' names, rows permuted."""
    permuted = dict(weights)
    _unpermute(permuted, "backbone.", config.backbone, _to_halves)
    _unpermute(permuted, "decoder.", config.decoder, _to_halves)
    renames = (
        (r"^audio_embeddings\.", "depth_decoder.model.embed_tokens."),
        (r"^projection\.", "depth_decoder.model.inputs_embeds_projector."),
        (r"^audio_head$", "depth_decoder.codebooks_head.weight"),
        (r"^text_embeddings\.", "embed_text_tokens."),
        (r"^codebook0_head\.", "lm_head."),
        (r"^backbone\.", "backbone_model."),
        (r"^decoder\.", "depth_decoder.model."),
    )
    return _rename(permuted, renames)


def _rename(weights: Mapping[str, mx.array], renames: Renames) -> Weights:
    renamed: Weights = {}
    for key, value in weights.items():
        name = key
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _unpermute(
    weights: Weights,
    prefix: str,
    config: LlamaConfig,
    turn: Callable[[mx.array, int], mx.array] | None = None,
) -> None:
    prefix = re.escape(prefix)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for letter, num_heads in heads.items():
        pattern = rf"^{prefix}layers\..*\.{letter}_proj\.weight$"
        _unpermute_rows(weights, pattern, num_heads, turn)


def _unpermute_rows(
    weights: Weights,
    pattern: str,
    num_heads: int,
    turn: Callable[[mx.array, int], mx.array] | None = None,
) -> None:
    for key in [key for key in weights if re.search(pattern, key)]:
        if weights[key].shape[0] % (2 * num_heads) == 0:
            weights[key] = (turn or _to_pairs)(weights[key], num_heads)


def _to_pairs(weight: mx.array, num_heads: int) -> mx.array:
    """Reorder rows from HF's rotary halves (j, j + d/2) to pairs (2j, 2j + 1)."""
    rows, width = weight.shape
    return (
        weight.reshape(num_heads, 2, rows // num_heads // 2, width)
        .swapaxes(1, 2)
        .reshape(rows, width)
    )


def _to_halves(weight: mx.array, num_heads: int) -> mx.array:
    """Reorder rows from rotary pairs (2j, 2j + 1) to HF's halves (j, j + d/2)."""
    rows, width = weight.shape
    return (
        weight.reshape(num_heads, rows // num_heads // 2, 2, width)
        .swapaxes(1, 2)
        .reshape(rows, width)
    )


def _split_in_proj(weights: Weights) -> None:
    for key in [key for key in weights if key.endswith(".in_proj_weight")]:
        parts = mx.split(weights.pop(key), 3, axis=0)
        for letter, part in zip("qkv", parts, strict=True):
            weights[key.replace("in_proj_weight", f"{letter}_proj.weight")] = part


def _stack_codebooks(weights: Weights) -> None:
    """Replace each branch's running sums by one array of codebooks (N, bins, codebook_dim)."""
    for branch in ("semantic", "acoustic"):
        prefix = f"quantizer.{branch}.layers."
        layers = sorted({int(key.split(".")[3]) for key in weights if key.startswith(prefix)})
        codebooks = []
        for layer in layers:
            usage = weights.pop(f"{prefix}{layer}.codebook.cluster_usage", None)
            total = weights.pop(f"{prefix}{layer}.codebook.embed_sum", None)
            weights.pop(f"{prefix}{layer}.codebook.initialized", None)
            if usage is not None and total is not None:
                codebooks.append(total / mx.maximum(usage, 1e-5)[:, None])
        if codebooks:
            weights[f"quantizer.{branch}.codebooks"] = mx.stack(codebooks)
        for side in ("input_proj", "output_proj"):
            key = f"quantizer.{branch}.{side}.weight"
            if key in weights and weights[key].ndim == 3:
                weights[key] = weights[key].squeeze(-1)


def _orient_convolutions(weights: Weights, config: MimiConfig) -> None:
    """Turn PyTorch's (O, I, k) and transposed (I, O, k) kernels into MLX's (O, k, I)."""
    stage = 2 + config.num_residual_layers
    transposed = {
        f"decoder.layers.{2 + stage * index}.weight"
        for index in range(len(config.upsampling_ratios))
    }
    for key, value in weights.items():
        if key.endswith(".weight") and value.ndim == 3:
            weights[key] = value.transpose(1, 2, 0) if key in transposed else value.swapaxes(1, 2)


def _sample(weights: Mapping[str, mx.array]) -> str:
    keys = sorted(weights)
    shown = ", ".join(keys[:4]) + (" ..." if len(keys) > 4 else "")
    return f"It holds {len(keys)} tensors: {shown}"
