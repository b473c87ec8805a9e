"""Load a model whole, with its codec, tokenizer and adapter, and write it as one folder.

A model folder holds `config.json`, `model.safetensors` (CSM, MLX names), `mimi.safetensors` (this
project's names) and `tokenizer.json`: all that speech needs, offline.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from csm_studio.checkpoints.hub import Progress
from csm_studio.checkpoints.sources import CONFIG_FILE, TOKENIZER_FILE
from csm_studio.checkpoints.weights import Weights, flatten
from csm_studio.configs import CSMConfig, MimiConfig, csm_1b
from csm_studio.errors import AdapterError, ConfigError, OptionError, WeightsError
from csm_studio.files import atomic_path, write_json, write_text
from csm_studio.model_files import (
    CSM_1B,
    FORMAT,
    FORMAT_VERSION,
    MIMI_FILE,
    MODEL_FILE,
    fetch_default_mimi,
    fetch_default_tokenizer,
    find_model,
    read_config,
)
from csm_studio.models.adapters import load_lora_weights
from csm_studio.models.csm import CSM, Companions
from csm_studio.models.mimi.codec import Mimi
from csm_studio.text.tokenizer import TextTokenizer

STORAGE_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def load_model(
    name_or_path: str | Path = CSM_1B,
    adapter: str | Path | None = None,
    progress: Progress | None = None,
) -> CSM:
    """Load a model with its codec and tokenizer in `companions`.

    Args:
        name_or_path: `demo` (bundled, small), `csm-1b` (public, downloaded once), a model folder
            (this project's, HF transformers' or Sesame's), a weights file, a checkpoint of full
            finetuning, or a repository `owner/name` of the hub.
        adapter: A LoRA adapter that was trained on this model; it stays unmerged.
        progress: Called while downloading with bytes done, bytes in all and the file's name.

    Raises:
        CsmStudioError: A part is missing or does not fit; says which and what to do.
    """
    files = find_model(name_or_path, progress)
    model = CSM(files.config).load_weights(files.weights)
    codec = Mimi(files.mimi_config).load_file(files.mimi)
    companions = Companions(codec, TextTokenizer.from_file(files.tokenizer))
    check_companions(model.config, companions)
    model.companions = companions
    if adapter is not None:
        load_lora_weights(model, Path(adapter).expanduser())
    return model


def default_companions(config: CSMConfig) -> Companions:
    """Return the public codec and tokenizer, loaded once per process.

    Raises:
        ConfigError: A model of this geometry was trained with others.
        HubError: They must be downloaded and cannot be.
    """
    public = csm_1b()
    for what, theirs, ours in (
        ("audio_num_codebooks", config.audio_num_codebooks, public.audio_num_codebooks),
        ("text_vocab_size", config.text_vocab_size, public.text_vocab_size),
    ):
        if theirs != ours:
            raise ConfigError(
                f"The model has {what} {theirs}; the public codec and tokenizer are for {ours}. "
                "Load it with load_model, or give its codec and tokenizer."
            )
    return _public_companions()


def check_companions(config: CSMConfig, companions: Companions) -> None:
    """Check that a model, a codec and a tokenizer can work together.

    Raises:
        ConfigError: Lists what does not fit.
    """
    mimi, tokenizer = companions.codec.config, companions.tokenizer
    problems = [
        f"the {part} {theirs} {what}, more than the model's {ours}"
        for part, what, theirs, ours in (
            ("codec has", "codes per codebook", mimi.codebook_size, config.audio_vocab_size),
            ("tokenizer has", "tokens", tokenizer.vocab_size, config.text_vocab_size),
        )
        if theirs > ours
    ]
    if mimi.num_quantizers < config.audio_num_codebooks:
        problems.append(
            f"the codec has {mimi.num_quantizers} codebooks, fewer than the model's "
            f"{config.audio_num_codebooks}"
        )
    if problems:
        raise ConfigError(
            f"Model, codec and tokenizer do not belong together: {'; '.join(problems)}. Use those "
            "that came with the model."
        )


def save_model_folder(
    model: CSM,
    folder: Path,
    name: str,
    description: str = "",
    dtype: str = "float32",
    codec_dtype: str = "float32",
) -> list[Path]:
    """Write a model with its companions as a folder that `load_model` reads.

    Weights come first and the final `config.json` last: an interrupted folder says that it is
    incomplete and is not loaded.

    Args:
        model: A model with companions and without an unmerged adapter.
        folder: A new or empty folder, or a model folder to replace.
        name: What the model is called.
        description: One or two sentences about it.
        dtype: Storage of the CSM: float32, float16 or bfloat16.
        codec_dtype: Storage of the codec. Less than float32 changes some codes of audio.

    Returns:
        The files written.

    Raises:
        AdapterError: The model has an unmerged adapter.
        ConfigError: The model has no companions.
        OptionError: The folder is something else, or a dtype is unknown.
        WeightsError: A weight is too large for the dtype.
    """
    if model.adapter is not None:
        raise AdapterError(f"{folder}: not written, the model's LoRA adapter is not merged yet.")
    if model.companions is None:
        raise ConfigError(f"{folder}: not written, the model has no codec. Use load_model.")
    check_target(folder)
    codec = model.companions.codec
    parts = {MODEL_FILE: (model, dtype), MIMI_FILE: (codec, codec_dtype)}
    converted = {
        file: _converted(flatten(part.parameters()), d) for file, (part, d) in parts.items()
    }
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": name,
        "description": description,
        "csm": model.config.to_dict(),
        "mimi": codec.config.to_dict(),
    }
    is_new = not folder.exists()
    try:
        write_json(folder / CONFIG_FILE, {**config, "incomplete": True})
        for file, weights in converted.items():
            with atomic_path(folder / file) as temporary:
                mx.save_safetensors(str(temporary), weights, {"format": "mlx"})
        write_text(folder / TOKENIZER_FILE, model.companions.tokenizer.to_json())
        write_json(folder / CONFIG_FILE, config)
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return [folder / file for file in (CONFIG_FILE, MODEL_FILE, MIMI_FILE, TOKENIZER_FILE)]


def check_target(folder: Path) -> None:
    """Check that a model folder may be written to a place.

    Raises:
        OptionError: It is a file, or a folder with something else in it.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder}: is a file. Give a new folder.")
    if folder.is_dir() and any(folder.iterdir()):
        values: dict[str, Any] | None = read_config(folder)
        if values is None or values.get("format") != FORMAT:
            raise OptionError(
                f"{folder}: is not empty and not a model folder of CSM Studio. Give a new folder."
            )


@functools.cache
def _public_companions() -> Companions:
    codec = Mimi(MimiConfig()).load_file(fetch_default_mimi())
    return Companions(codec, TextTokenizer.from_file(fetch_default_tokenizer()))


def _converted(weights: Weights, dtype: str) -> Weights:
    if dtype not in STORAGE_DTYPES:
        raise OptionError(f"dtype {dtype!r} is unknown; choose from {', '.join(STORAGE_DTYPES)}.")
    stored = {name: value.astype(STORAGE_DTYPES[dtype]) for name, value in weights.items()}
    too_large = [name for name, value in stored.items() if not mx.isfinite(value).all().item()]
    if too_large:
        raise WeightsError(
            f"{too_large[0]}: has values that are not finite as {dtype} ({len(too_large)} tensors "
            "in all). Choose float32, or check the weights."
        )
    return stored
