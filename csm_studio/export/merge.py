"""Make a finetuned voice a model of its own: base and adapter merged, with codec and tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mlx.core as mx
import numpy as np

from csm_studio.checkpoints.hub import Progress
from csm_studio.errors import AdapterError
from csm_studio.model_files import base_of
from csm_studio.model_folder import STORAGE_DTYPES, check_target, load_model, save_model_folder
from csm_studio.models.csm import CSM
from csm_studio.models.lora import merge_lora_weights

TOLERANCE = 1e-3
"""Largest difference of merged and unmerged logits, as a share of the largest logit."""

_NUM_PROBE_FRAMES = 16


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What merging did.

    Attributes:
        folder: The model folder.
        base: The model that the adapter was merged into.
        sizes: Bytes of each file written, by name.
        largest_logit: Largest magnitude in the forward pass that was compared.
        difference: Largest difference between merged and unmerged logits, in float32.
        rounding: The further difference made by storing the weights in the dtype chosen.
    """

    folder: Path
    base: str
    sizes: dict[str, int]
    largest_logit: float
    difference: float
    rounding: float


def merge_adapter(
    adapter: Path,
    folder: Path,
    base: str | None = None,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> MergeReport:
    """Merge an adapter into its base and write the result as a model folder.

    The merged model must give the logits of base and adapter on a forward pass of backbone and
    depth decoder, or nothing is written.

    Args:
        adapter: File of LoRA finetuning.
        folder: A new or empty folder, or a model folder to replace.
        base: The base model; None takes the one named in the adapter.
        dtype: Storage of the weights: float32, float16 or bfloat16.
        progress: Called while downloading the base.

    Raises:
        AdapterError: The adapter names no base, belongs to another one, or the check fails.
        OptionError: The folder has something else in it.
        CsmStudioError: The base cannot be loaded.
    """
    check_target(folder)
    base = base or base_of(adapter)
    if base is None:
        raise AdapterError(f"{adapter}: does not say which model it was trained on. Give --model.")
    model = load_model(base, adapter, progress)
    # Where the base is held in half precision, adding to it there would round the adapter away.
    model.set_dtype(mx.float32)
    unmerged = probe_logits(model)
    merge_lora_weights(model)
    merged = probe_logits(model)
    largest, difference = _largest(unmerged), _largest(merged - unmerged)
    if not difference <= TOLERANCE * largest:
        raise AdapterError(
            f"{adapter}: the merged model differs from base and adapter by {difference:.2g} where "
            f"logits reach {largest:.2g}, more than a share of {TOLERANCE:g}. Nothing was written; "
            "use the adapter unmerged."
        )
    name = f"{adapter.stem} merged"
    description = f"{base} with the LoRA adapter {adapter.name} merged into it."
    files = save_model_folder(model, folder, name, description, dtype)
    model.apply(lambda weight: weight.astype(STORAGE_DTYPES[dtype]).astype(mx.float32))
    return MergeReport(
        folder=folder,
        base=base,
        sizes={file.name: file.stat().st_size for file in files},
        largest_logit=largest,
        difference=difference,
        rounding=_largest(probe_logits(model) - merged),
    )


def probe_logits(model: CSM) -> mx.array:
    """Return the logits of one forward pass over fixed pseudo-random frames.

    Returns:
        Float32 (T * K, V): codebook 0 from the backbone, the others from the depth decoder.
    """
    config, num_frames = model.config, _NUM_PROBE_FRAMES
    text_key, audio_key = mx.random.split(mx.random.key(0))
    text = mx.random.randint(0, config.text_vocab_size, (1, num_frames, 1), key=text_key)
    shape = (1, num_frames, config.audio_num_codebooks)
    codes = mx.random.randint(0, config.audio_vocab_size, shape, key=audio_key)
    tokens = mx.concatenate([codes, text], axis=-1)
    hidden = model.hidden_states(tokens, mx.ones(tokens.shape))
    first = model.codebook0_logits(hidden)[0]
    others = model.depth_logits(hidden[0], codes[0])
    logits = mx.concatenate([first, others.reshape(-1, others.shape[-1])]).astype(mx.float32)
    mx.eval(logits)
    return logits


def _largest(values: mx.array) -> float:
    return float(np.abs(np.array(values)).max())
