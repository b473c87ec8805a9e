"""Named arrays in safetensors files: read whole or in shards, described, checked.

Only safetensors files are read; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from csm_studio.errors import WeightsError
from csm_studio.files import atomic_path

Weights = dict[str, mx.array]
Shapes = Mapping[str, tuple[int, ...]]

METADATA_KEY = "csm_studio"
"""Key of the safetensors header under which checkpoints describe themselves, as JSON."""

INDEX_NAME = "model.safetensors.index.json"
_FINGERPRINT_SAMPLES = 64


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


def read_description(path: Path | str) -> dict[str, Any]:
    """Return what a checkpoint of this project says of itself, or {} for any other file.

    Raises:
        WeightsError: The file cannot be read.
    """
    described = read_header(Path(path)).get(METADATA_KEY)
    return json.loads(described) if described else {}


def save_weights(
    path: Path, weights: Mapping[str, mx.array], description: Mapping[str, Any]
) -> None:
    """Write a checkpoint that describes itself, atomically; `read_description` reads that back.

    Args:
        path: `NAME.safetensors`.
        weights: Arrays by name.
        description: What the checkpoint says of itself, as JSON can hold it.
    """
    with atomic_path(path) as temporary:
        header = {METADATA_KEY: json.dumps(description)}
        mx.save_safetensors(str(temporary), dict(weights), header)


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


def flatten(tree: Any) -> Weights:
    """Return the arrays of a parameter tree by dotted name."""
    return dict(cast("list[tuple[str, mx.array]]", tree_flatten(tree)))


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a parameter tree's arrays by dotted name."""
    return {name: tuple(value.shape) for name, value in flatten(tree).items()}


def fingerprint(weights: Mapping[str, mx.array]) -> str:
    """Return a short hash that tells models apart, whatever dtype they are held in.

    It covers every tensor's name and shape and 64 of its values, rounded to bf16, so that it
    costs milliseconds at any size.

    Returns:
        16 hex digits.
    """
    samples = {}
    for name in sorted(weights):
        value = weights[name]
        # In float64: the places in a large table are beyond what float32 can count.
        at = np.linspace(0, value.size - 1, _FINGERPRINT_SAMPLES).astype(np.int64)
        samples[name] = value.reshape(-1)[mx.array(at)].astype(mx.bfloat16).astype(mx.float32)
    mx.eval(samples)
    digest = hashlib.sha256()
    for name, sample in samples.items():
        digest.update(f"{name}{tuple(weights[name].shape)}".encode())
        digest.update(np.array(sample).tobytes())
    return digest.hexdigest()[:16]


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
