"""Low-rank adaptation (LoRA) of a CSM: apply and merge adapters.

An adapted layer keeps its weight's name, frozen, and gains `lora_a` and `lora_b`, so that its
output grows by `scale * (x @ lora_a) @ lora_b` with `scale = alpha / rank`. `lora_b` starts at
zero: a fresh adapter changes nothing. Source: Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from csm_studio.checkpoints.weights import fingerprint, flatten
from csm_studio.constants import EMBEDDING_TABLES, LORA_ALPHA, LORA_RANK, LORA_TARGETS
from csm_studio.errors import AdapterError
from csm_studio.models.csm import CSM

_GROUPS = {
    "attn": r"(backbone|decoder)\.layers\.\d+\.self_attn\.[qkvo]_proj",
    "mlp": r"(backbone|decoder)\.layers\.\d+\.mlp\.(gate|up|down)_proj",
}
_AUDIO_HEAD = "audio_head"


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """What an adapter is.

    Attributes:
        rank: Width of the low-rank matrices.
        alpha: Numerator of the scale alpha / rank.
        target_modules: Names as given: groups (`attn`, `mlp`), modules or dotted paths.
        base_fingerprint: `base_fingerprint` of the model that the adapter belongs to.
        train_embeddings: Whether both embedding tables are trained whole and stored with it.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    base_fingerprint: str
    train_embeddings: bool = False


class LoRALinear(nn.Module):
    """A bias-free linear layer with an adapter."""

    def __init__(self, weight: mx.array, rank: int, scale: float, key: mx.array) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.weight = weight
        # Adapters are float32 whatever the base is: bf16 would lose small updates.
        self.lora_a = mx.random.normal((in_features, rank), scale=in_features**-0.5, key=key)
        self.lora_b = mx.zeros((rank, out_features))
        self.scale = scale
        self.freeze(keys=["weight"], recurse=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., in) to (..., out)."""
        update = (x.astype(mx.float32) @ self.lora_a) @ self.lora_b
        return x @ self.weight.T + (self.scale * update).astype(x.dtype)

    def merged(self) -> nn.Module:
        """Return a plain linear layer with the update added to its weight."""
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, bias=False)
        linear.weight = _add(self.weight, self.scale * (self.lora_a @ self.lora_b).T)
        return linear


class LoRAEmbedding(nn.Module):
    """An embedding table with an adapter."""

    def __init__(self, weight: mx.array, rank: int, scale: float, key: mx.array) -> None:
        super().__init__()
        num_rows, width = weight.shape
        self.weight = weight
        self.lora_a = mx.random.normal((num_rows, rank), scale=width**-0.5, key=key)
        self.lora_b = mx.zeros((rank, width))
        self.scale = scale
        self.freeze(keys=["weight"], recurse=False)

    def __call__(self, ids: mx.array) -> mx.array:
        """Look up integer ids (...) as (..., D)."""
        update = self.lora_a[ids] @ self.lora_b
        return self.weight[ids] + (self.scale * update).astype(self.weight.dtype)

    def merged(self) -> nn.Module:
        """Return a plain embedding with the update added to its table."""
        embedding = nn.Embedding(1, 1)
        embedding.weight = _add(self.weight, self.scale * (self.lora_a @ self.lora_b))
        return embedding


class LoRAHeads(nn.Module):
    """The stacked heads of codebooks 1 to K - 1, one adapter each."""

    def __init__(self, weight: mx.array, rank: int, scale: float, key: mx.array) -> None:
        super().__init__()
        num_heads, width, vocab = weight.shape
        self.weight = weight
        self.lora_a = mx.random.normal((num_heads, width, rank), scale=width**-0.5, key=key)
        self.lora_b = mx.zeros((num_heads, rank, vocab))
        self.scale = scale
        self.freeze(keys=["weight"], recurse=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (N, K - 1, d) to logits (N, K - 1, V), each codebook by its own head."""
        x = x.swapaxes(0, 1)
        update = (x.astype(mx.float32) @ self.lora_a) @ self.lora_b
        return (x @ self.weight + (self.scale * update).astype(x.dtype)).swapaxes(0, 1)

    def one(self, x: mx.array, index: int) -> mx.array:
        """Map (B, d) to logits (B, V) by head `index`."""
        update = (x.astype(mx.float32) @ self.lora_a[index]) @ self.lora_b[index]
        return x @ self.weight[index] + (self.scale * update).astype(x.dtype)

    def merged(self) -> mx.array:
        """Return the plain heads (K - 1, d, V) with the updates added."""
        return _add(self.weight, self.scale * (self.lora_a @ self.lora_b))


def apply_lora_to_model(
    model: CSM,
    rank: int = LORA_RANK,
    alpha: float = LORA_ALPHA,
    target_modules: Sequence[str] = LORA_TARGETS,
    seed: int = 0,
) -> CSM:
    """Freeze a model and give the target modules fresh adapters, which alone are trainable.

    Args:
        model: The base model, weights loaded. It is changed in place.
        rank: Width of the low-rank matrices.
        alpha: The update is scaled by alpha / rank.
        target_modules: `attn` and `mlp` (every backbone and depth layer), `codebook0_head`,
            `projection`, `audio_head`, `text_embeddings`, `audio_embeddings`, the last parts of
            a path (`q_proj`) or a full dotted path.
        seed: Seeds the initial `lora_a`.

    Returns:
        The same model.

    Raises:
        AdapterError: A name matches nothing, the rank is not positive, or the model already has
            an adapter.
    """
    if model.adapter is not None:
        raise AdapterError("The model already has a LoRA adapter. Merge it or load a fresh model.")
    if rank < 1:
        raise AdapterError(f"LoRA rank is {rank}; it must be at least 1 (4 to 16 is usual).")
    paths = resolve_targets(model, target_modules)
    fingerprint = base_fingerprint(model)
    model.freeze()
    keys = mx.random.split(mx.random.key(seed), len(paths))
    scale = alpha / rank
    for path, key in zip(paths, keys, strict=True):
        parent, name = _parent(model, path)
        target = getattr(parent, name)
        if isinstance(target, mx.array):
            # The frozen array's name would keep the module that takes its place frozen too.
            parent.unfreeze(keys=[name], recurse=False)
            adapted: nn.Module = LoRAHeads(target, rank, scale, key)
        elif isinstance(target, nn.Embedding):
            adapted = LoRAEmbedding(target.weight, rank, scale, key)
        else:
            adapted = LoRALinear(target.weight, rank, scale, key)
        setattr(parent, name, adapted)
    mx.eval(model.trainable_parameters())
    model.adapter = AdapterSpec(rank, float(alpha), tuple(target_modules), fingerprint)
    return model


def train_embeddings(model: CSM) -> None:
    """Make both embedding tables of an adapted model trainable as a whole.

    Raises:
        AdapterError: The model has no adapter, or an embedding is a LoRA target already.
    """
    if model.adapter is None:
        raise AdapterError("Apply LoRA to the model before choosing to train its embeddings.")
    doubled = [n for n in EMBEDDING_TABLES if isinstance(getattr(model, n), LoRAEmbedding)]
    if doubled:
        raise AdapterError(
            f"{' and '.join(doubled)} cannot be both a LoRA target and trained directly. Either "
            "leave embeddings out of --target-modules (they are trained whole: better quality, "
            "more memory) or drop --train-embeddings (they get low-rank adapters: less memory)."
        )
    for name in EMBEDDING_TABLES:
        getattr(model, name).unfreeze()
    model.adapter = dataclasses.replace(model.adapter, train_embeddings=True)


def resolve_targets(model: CSM, names: Sequence[str]) -> list[str]:
    """Return the dotted paths that target names stand for, in a fixed order.

    Raises:
        AdapterError: A name matches nothing; the possible names are listed.
    """
    candidates = [
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    ]
    candidates = sorted([*candidates, _AUDIO_HEAD])
    chosen: set[str] = set()
    unknown = []
    for name in names:
        pattern = _GROUPS.get(name, rf"(.*\.)?{re.escape(name)}")
        matches = [path for path in candidates if re.fullmatch(pattern, path)]
        if not matches:
            unknown.append(name)
        chosen.update(matches)
    if unknown or not chosen:
        what = ", ".join(unknown) if unknown else "nothing"
        raise AdapterError(
            f"--target-modules names {what}, which this model does not have. Choose from attn, "
            f"mlp, {', '.join(path for path in candidates if '.' not in path)}, or a full path "
            f"such as {candidates[-1] if '.' in candidates[-1] else candidates[2]}."
        )
    return [path for path in candidates if path in chosen]


def base_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of a model's weights, its adapter left out."""
    return fingerprint(
        {
            name.replace(f"{_AUDIO_HEAD}.weight", _AUDIO_HEAD): value
            for name, value in flatten(model.parameters()).items()
            if "lora_" not in name
        }
    )


def merge_lora_weights(model: CSM) -> CSM:
    """Add the adapter to the base weights; the model is plain again and runs at full speed.

    Returns:
        The same model, with every parameter trainable again.

    Raises:
        AdapterError: The model has no adapter.
    """
    adapter_spec(model)
    for path, module in model.named_modules():
        if isinstance(module, (LoRALinear, LoRAEmbedding, LoRAHeads)):
            parent, name = _parent(model, path)
            setattr(parent, name, module.merged())
    model.adapter = None
    model.unfreeze()
    mx.eval(model.parameters())
    return model


def adapter_spec(model: CSM) -> AdapterSpec:
    """Return what adapter a model has.

    Raises:
        AdapterError: It has none.
    """
    if model.adapter is None:
        raise AdapterError("The model has no LoRA adapter. Call apply_lora_to_model first.")
    return model.adapter


def _parent(model: nn.Module, path: str) -> tuple[Any, str]:
    *parts, name = path.split(".")
    parent: Any = model
    for part in parts:
        parent = parent[int(part)] if part.isdigit() else getattr(parent, part)
    return parent, name


def _add(weight: mx.array, update: mx.array) -> mx.array:
    return (weight.astype(mx.float32) + update).astype(weight.dtype)
