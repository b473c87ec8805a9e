"""Weight layouts of CSM and Mimi, recognised by their keys, as rename tables.

CSM: MLX (`senstella/csm-1b-mlx`, with mlx-audio's `model.` prefix too), Sesame/torchtune and HF
transformers. Mimi: this project's own, kyutai and HF transformers (alone or inside a CSM). Only
safetensors files are read; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from csm_studio.configs import CSMConfig, LlamaConfig, MimiConfig
from csm_studio.errors import WeightsError

Weights = dict[str, mx.array]
Shapes = Mapping[str, tuple[int, ...]]
Renames = tuple[tuple[str, str], ...]

METADATA_KEY = "csm_studio"
"""Key of the safetensors header under which checkpoints describe themselves, as JSON."""

CODEC_PREFIX = "codec_model."
INDEX_NAME = "model.safetensors.index.json"

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


def read_weights(path: Path) -> Weights:
    """Read a safetensors file, an index of shards, or a folder that holds either.

    Args:
        path: `NAME.safetensors`, `model.safetensors.index.json` or a folder.

    Returns:
        Arrays by the names in the file. They are read when first evaluated.

    Raises:
        WeightsError: Nothing readable is there, or the file is of a kind that is not read.
    """
    if not path.exists():
        raise WeightsError(f"{path}: not found. Check the path, or download the file first.")
    if path.is_dir():
        return read_weights(_weights_in(path))
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"{path}: only .safetensors weights are read; pickled files (.pt, .bin, .ckpt) could "
            "run code. Get the model as safetensors."
        )
    try:
        loaded = mx.load(str(path))
    except RuntimeError as error:
        raise WeightsError(
            f"{path}: not a readable safetensors file ({error}). Download it again."
        ) from error
    assert isinstance(loaded, dict)
    return loaded


def read_header(path: Path) -> dict[str, str]:
    """Return the text metadata of a safetensors file.

    Raises:
        WeightsError: The file cannot be read.
    """
    read_weights(path)
    _, header = cast("tuple[Weights, dict[str, str]]", mx.load(str(path), return_metadata=True))
    return header


def read_description(path: Path) -> dict[str, Any]:
    """Return what a checkpoint of this project says of itself, or {} for any other file.

    Raises:
        WeightsError: The file cannot be read.
    """
    described = read_header(path).get(METADATA_KEY)
    return json.loads(described) if described else {}


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


def for_device(weights: Weights) -> Weights:
    """Return the weights in the dtype that suits the default device.

    Half precision never uses the BLAS of a CPU (MLX 0.32), so weights become float32 there; a GPU
    keeps what the file holds.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        return weights
    return {name: value.astype(mx.float32) for name, value in weights.items()}


def check_shapes(weights: Weights, expected: Shapes, what: str) -> None:
    """Raise one `WeightsError` if names or shapes differ from what a model expects."""
    problems = [f"missing {name} {expected[name]}" for name in expected.keys() - weights.keys()]
    problems += [
        f"unexpected {name} {tuple(weights[name].shape)}"
        for name in weights.keys() - expected.keys()
    ]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, not {expected[name]}"
        for name in expected.keys() & weights.keys()
        if tuple(weights[name].shape) != tuple(expected[name])
    ]
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in sorted(problems))
        raise WeightsError(
            f"{what}: does not fit this model, {len(problems)} tensors differ. Use the config.json "
            f"that came with these weights.\n{lines}"
        )


def _weights_in(folder: Path) -> Path:
    for name in (INDEX_NAME, "model.safetensors", "ckpt.safetensors"):
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(
        f"{folder}: holds no model.safetensors, ckpt.safetensors or {INDEX_NAME}. "
        "Name the weights file itself."
    )


def _read_shards(index: Path) -> Weights:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{index}: not an index of shards. Download it again.") from error
    missing = [name for name in sorted(names) if not (index.parent / name).is_file()]
    if missing:
        raise WeightsError(f"{index}: shards missing beside it: {', '.join(missing)}.")
    weights: Weights = {}
    for name in sorted(names):
        weights.update(read_weights(index.parent / name))
    return weights


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


def flatten(tree: Any) -> Weights:
    """Return the arrays of a parameter tree by dotted name."""
    return dict(cast("list[tuple[str, mx.array]]", tree_flatten(tree)))


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a parameter tree's arrays by dotted name."""
    return {name: tuple(value.shape) for name, value in flatten(tree).items()}


def _sample(weights: Mapping[str, mx.array]) -> str:
    keys = sorted(weights)
    shown = ", ".join(keys[:4]) + (" ..." if len(keys) > 4 else "")
    return f"It holds {len(keys)} tensors: {shown}"
