"""Low-rank adaptation (LoRA) of a CSM: apply, save, load and merge adapters.

An adapted layer keeps its weight's name, frozen, and gains `lora_a` and `lora_b`, so that its
output grows by `scale * (x @ lora_a) @ lora_b` with `scale = alpha / rank`. `lora_b` starts at
zero: a fresh adapter changes nothing. Source: Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from csm_studio.checkpoints import formats
from csm_studio.checkpoints.formats import METADATA_KEY, flatten, read_description
from csm_studio.constants import EMBEDDING_TABLES, LORA_ALPHA, LORA_RANK, LORA_TARGETS
from csm_studio.errors import AdapterError
from csm_studio.files import atomic_path
from csm_studio.models.csm import CSM

_GROUPS = {
    "attn": r"(backbone|decoder)\.layers\.\d+\.self_attn\.[qkvo]_proj",
    "mlp": r"(backbone|decoder)\.layers\.\d+\.mlp\.(gate|up|down)_proj",
}
_AUDIO_HEAD = "audio_head"
_FINGERPRINT_SAMPLES = 64


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
    """Return a short hash that tells base models apart, whatever dtype they are held in.

    It covers every base tensor's name and shape and 64 of its values, rounded to bf16, so that
    it costs milliseconds at any size.
    """
    digest = hashlib.sha256()
    tensors = sorted(
        (name.replace(f"{_AUDIO_HEAD}.weight", _AUDIO_HEAD), value)
        for name, value in flatten(model.parameters()).items()
        if "lora_" not in name
    )
    samples = []
    for _, value in tensors:
        at = mx.linspace(0, value.size - 1, _FINGERPRINT_SAMPLES).astype(mx.int32)
        samples.append(value.reshape(-1)[at].astype(mx.bfloat16).astype(mx.float32))
    mx.eval(samples)
    for (name, value), sample in zip(tensors, samples, strict=True):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(np.array(sample).tobytes())
    return digest.hexdigest()[:16]


def adapter_tensors(model: CSM) -> dict[str, mx.array]:
    """Return what an adapter file holds: the LoRA matrices and directly trained embeddings."""
    spec = _spec(model)
    whole = {f"{name}.weight" for name in EMBEDDING_TABLES} if spec.train_embeddings else set()
    return {
        name: value
        for name, value in flatten(model.parameters()).items()
        if name in whole or name.rsplit(".", 1)[-1] in ("lora_a", "lora_b")
    }


def save_lora_weights(
    model: CSM, path: Path | str, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a model's adapter, atomically, with all that loading needs in the file's header.

    Args:
        model: A model with an adapter.
        path: `NAME.safetensors`.
        metadata: More to keep in the header, such as the base's name and the training settings.
    """
    header = {"kind": "lora", **dataclasses.asdict(_spec(model)), **(metadata or {})}
    with atomic_path(Path(path)) as temporary:
        mx.save_safetensors(
            str(temporary), adapter_tensors(model), {METADATA_KEY: json.dumps(header)}
        )


def load_lora_weights(model: CSM, path: Path | str) -> CSM:
    """Load an adapter into a model, giving it the adapter's structure if it has none.

    Args:
        model: The base that the adapter was trained on, plain or with LoRA applied alike.
        path: A file written by `save_lora_weights`.

    Returns:
        The same model.

    Raises:
        AdapterError: The adapter is of another base, rank, alpha or target set; the message names
            the difference. A model that was plain is plain again.
        WeightsError: The file cannot be read.
    """
    path = Path(path)
    weights = formats.read_weights(path)
    stored = _stored_spec(path)
    applied_here = model.adapter is None
    if applied_here:
        if stored is None:
            raise AdapterError(
                f"{path}: the file does not describe its adapter. Call apply_lora_to_model with "
                "the rank, alpha and target modules of its training first."
            )
        _check_base(path, stored, base_fingerprint(model))
        apply_lora_to_model(model, stored.rank, stored.alpha, stored.target_modules)
    elif stored is not None:
        _check_same(path, model, stored)
    if stored is not None and stored.train_embeddings and not _spec(model).train_embeddings:
        train_embeddings(model)
    expected = {name: tuple(value.shape) for name, value in adapter_tensors(model).items()}
    formats.check_shapes(weights, expected, f"{path} (LoRA adapter)")
    model.load_weights(list(weights.items()), strict=False)
    mx.eval(model.parameters())
    return model


def merge_lora_weights(model: CSM) -> CSM:
    """Add the adapter to the base weights; the model is plain again and runs at full speed.

    Returns:
        The same model, with every parameter trainable again.

    Raises:
        AdapterError: The model has no adapter.
    """
    _spec(model)
    for path, module in model.named_modules():
        if isinstance(module, (LoRALinear, LoRAEmbedding, LoRAHeads)):
            parent, name = _parent(model, path)
            setattr(parent, name, module.merged())
    model.adapter = None
    model.unfreeze()
    mx.eval(model.parameters())
    return model


def read_adapter_metadata(path: Path | str) -> dict[str, Any]:
    """Return what a checkpoint says of itself in its header, or {} if it says nothing.

    Raises:
        WeightsError: The file cannot be read.
    """
    return read_description(Path(path))


def _stored_spec(path: Path) -> AdapterSpec | None:
    header = read_adapter_metadata(path)
    if not header:
        return None
    if header.get("kind") != "lora":
        raise AdapterError(
            f"{path}: a {header.get('kind')} checkpoint, not a LoRA adapter. Load it as a model."
        )
    return AdapterSpec(
        rank=header["rank"],
        alpha=header["alpha"],
        target_modules=tuple(header["target_modules"]),
        base_fingerprint=header["base_fingerprint"],
        train_embeddings=header["train_embeddings"],
    )


def _check_base(path: Path, stored: AdapterSpec, fingerprint: str) -> None:
    if stored.base_fingerprint != fingerprint:
        name = read_adapter_metadata(path).get("base_model", "another model")
        raise AdapterError(
            f"{path}: the adapter belongs to another base model ({name}, fingerprint "
            f"{stored.base_fingerprint}); this model's fingerprint is {fingerprint}. Load the base "
            "it was trained on."
        )


def _check_same(path: Path, model: CSM, stored: AdapterSpec) -> None:
    applied = _spec(model)
    _check_base(path, stored, applied.base_fingerprint)
    differences = [
        f"{what} is {theirs} in the file and {ours} in the model"
        for what, theirs, ours in (
            ("rank", stored.rank, applied.rank),
            ("alpha", stored.alpha, applied.alpha),
        )
        if theirs != ours
    ]
    theirs, ours = set(stored.target_modules), set(applied.target_modules)
    if theirs != ours:
        differences.append(f"target_modules are {sorted(theirs)} in the file and {sorted(ours)}")
    if differences:
        raise AdapterError(
            f"{path}: the adapter does not fit the LoRA structure of the model: "
            f"{'; '.join(differences)}. Call apply_lora_to_model with the file's values, or load "
            "into a plain model, which takes them from the file."
        )


def _spec(model: CSM) -> AdapterSpec:
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
