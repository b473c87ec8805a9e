"""Adapter files: save and load the LoRA adapter of a CSM.

A file describes itself in its header: rank, alpha, targets and the base it belongs to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from csm_studio.checkpoints.weights import (
    check_shapes,
    flatten,
    read_description,
    read_weights,
    save_weights,
    shapes_of,
)
from csm_studio.constants import EMBEDDING_TABLES
from csm_studio.errors import AdapterError, WeightsError
from csm_studio.models.csm import CSM
from csm_studio.models.lora import (
    AdapterSpec,
    adapter_spec,
    apply_lora_to_model,
    base_fingerprint,
    merge_lora_weights,
    train_embeddings,
)


def adapter_tensors(model: CSM) -> dict[str, mx.array]:
    """Return what an adapter file holds: the LoRA matrices and directly trained embeddings."""
    spec = adapter_spec(model)
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
    description = {"kind": "lora", **dataclasses.asdict(adapter_spec(model)), **(metadata or {})}
    save_weights(Path(path), adapter_tensors(model), description)


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
    weights = read_weights(path)
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
    if stored is not None and stored.train_embeddings and not adapter_spec(model).train_embeddings:
        train_embeddings(model)
    expected = shapes_of(adapter_tensors(model))
    try:
        check_shapes(weights, expected, f"{path} (LoRA adapter)")
    except WeightsError:
        if applied_here:
            merge_lora_weights(model)  # adds zero: a fresh adapter changes nothing
        raise
    model.load_weights(list(weights.items()), strict=False)
    mx.eval(model.parameters())
    return model


def _stored_spec(path: Path) -> AdapterSpec | None:
    header = read_description(path)
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
        name = read_description(path).get("base_model", "another model")
        raise AdapterError(
            f"{path}: the adapter belongs to another base model ({name}, fingerprint "
            f"{stored.base_fingerprint}); this model's fingerprint is {fingerprint}. Load the base "
            "it was trained on."
        )


def _check_same(path: Path, model: CSM, stored: AdapterSpec) -> None:
    applied = adapter_spec(model)
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
