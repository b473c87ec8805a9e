"""Where the parts of a model are: finds them by name, in a folder, beside a file or on the hub."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from csm_studio.checkpoints import hub
from csm_studio.checkpoints.formats import CODEC_PREFIX
from csm_studio.checkpoints.sources import (
    CONFIG_FILE,
    DEFAULT_CSM,
    DEFAULT_MIMI,
    DEFAULT_TOKENIZER,
    MIMI_SOURCES,
    TOKENIZER_FILE,
    WEIGHT_FILES,
)
from csm_studio.checkpoints.weights import read_description, read_weights
from csm_studio.configs import CSMConfig, MimiConfig, csm_1b
from csm_studio.errors import (
    AdapterError,
    ConfigError,
    CsmStudioError,
    HubError,
    TokenizerError,
    WeightsError,
)

DEMO = "demo"
CSM_1B = "csm-1b"
FORMAT = "csm_studio"
FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
MIMI_FILE = "mimi.safetensors"

_DEMO_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "demo_voice"
_REPO_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
# The published codec under its own name, then under the one that this project gives it.
_MIMI_FILES = (MIMI_FILE, *(name for source in MIMI_SOURCES for name in source.filenames))


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """The parts of one model."""

    config: CSMConfig
    weights: Path
    mimi_config: MimiConfig
    mimi: Path
    tokenizer: Path


def find_model(name_or_path: str | Path, progress: hub.Progress | None = None) -> ModelFiles:
    """Find a model's parts, downloading those that only the hub has.

    Args:
        name_or_path: `demo` (bundled), `csm-1b` (the public model), a folder, a weights file, or a
            repository `owner/name` of the hub. A path that exists is never taken for a repository.
        progress: Called while downloading.

    Raises:
        CsmStudioError: Nothing is there, or a part is missing; says which and where to put it.
    """
    name = str(name_or_path)
    if name == DEMO:
        return _find_demo()
    if name == CSM_1B:
        return _find_in_folder(hub.fetch_model(DEFAULT_CSM.repo_id, progress=progress), progress)
    path = Path(name).expanduser()
    if path.is_dir():
        return _find_in_folder(path, progress)
    if path.is_file():
        return _find_from_file(path, progress)
    if not re.fullmatch(_REPO_ID, name) or name.endswith(".safetensors"):
        raise ConfigError(
            f"{name}: no such model. Give '{DEMO}', '{CSM_1B}', a model folder, a .safetensors "
            "file, or a repository of the hub as owner/name."
        )
    try:
        folder = hub.fetch_model(name, progress=progress)
    except HubError as error:
        raise HubError(
            f"{name}: no such folder here, so it was taken for a repository of the hub.\n{error}"
        ) from error
    return _find_in_folder(folder, progress)


def base_of(adapter: Path) -> str | None:
    """Return the name or path of the model that an adapter was trained on, if its file says so.

    Raises:
        WeightsError: The file cannot be read.
    """
    return read_description(adapter.expanduser()).get("base_model")


def fetch_default_mimi(progress: hub.Progress | None = None) -> Path:
    """Return the public Mimi's weights."""
    return hub.fetch(DEFAULT_MIMI.repo_id, DEFAULT_MIMI.filename, progress=progress)


def fetch_default_tokenizer(progress: hub.Progress | None = None) -> Path:
    """Return the public text tokenizer."""
    return hub.fetch(DEFAULT_TOKENIZER.repo_id, DEFAULT_TOKENIZER.filename, progress=progress)


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return a folder's `config.json`, or None if it has none.

    Raises:
        ConfigError: The file is not a JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}). Get the file again.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: describes no model. Get the file again.")
    return values


def _find_demo() -> ModelFiles:
    if not (_DEMO_FOLDER / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{_DEMO_FOLDER / CONFIG_FILE}: the bundled demo voice is not there. Get the whole "
            f"repository again, or give another model, such as '{CSM_1B}'."
        )
    return _find_in_folder(_DEMO_FOLDER, None)


def _find_in_folder(folder: Path, progress: hub.Progress | None) -> ModelFiles:
    values = read_config(folder)
    if values is not None and values.get("format") == FORMAT:
        return _find_own(folder, values)
    present = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    weights = next((path for path in present if not _holds_mimi(path)), None)
    if weights is None:
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        has = f"It has {', '.join(others)}: name the file itself." if others else "It has no other."
        raise WeightsError(
            f"{folder}: not a model folder, it has no CSM weights ({', '.join(WEIGHT_FILES)}). "
            f"{has}"
        )
    return _complete(weights, folder, values, progress)


def _find_own(folder: Path, values: Mapping[str, Any]) -> ModelFiles:
    """Check a folder written by `save_model_folder`."""
    config_path = folder / CONFIG_FILE
    if values.get("incomplete"):
        raise ConfigError(f"{folder}: its writing was interrupted. Write the model there again.")
    if values.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{config_path}: format_version is {values.get('format_version')!r}; this program "
            f"reads {FORMAT_VERSION}. Update CSM Studio."
        )
    parts = (MODEL_FILE, MIMI_FILE, TOKENIZER_FILE)
    missing = [name for name in parts if not (folder / name).is_file()]
    missing += [f"'{key}' in {CONFIG_FILE}" for key in ("csm", "mimi") if key not in values]
    if missing:
        raise ConfigError(
            f"{folder}: the model folder lacks {', '.join(missing)}. Copy the whole folder again."
        )
    return ModelFiles(
        _described(CSMConfig, values["csm"], folder),
        folder / MODEL_FILE,
        _described(MimiConfig, values["mimi"], folder),
        folder / MIMI_FILE,
        folder / TOKENIZER_FILE,
    )


def _find_from_file(path: Path, progress: hub.Progress | None) -> ModelFiles:
    names = read_weights(path)
    about = read_description(path) if path.suffix == ".safetensors" else {}
    base = about.get("base_model")
    if any(name.endswith(".lora_a") for name in names):
        raise AdapterError(
            f"{path}: a LoRA adapter, not a model. Give it as --adapter, with its base "
            f"({base or 'the one it was trained on'}) as --model."
        )
    if base is None:
        return _complete(path, path.parent, read_config(path.parent), progress)
    try:
        found = find_model(base, progress)
    except CsmStudioError as error:
        raise type(error)(
            f"{path}: was finetuned from {base!r}, whose codec and tokenizer it needs.\n{error}"
        ) from error
    config = _described(CSMConfig, about["config"], path) if "config" in about else found.config
    return dataclasses.replace(found, config=config, weights=path)


def _complete(
    weights: Path, folder: Path, values: Mapping[str, Any] | None, progress: hub.Progress | None
) -> ModelFiles:
    """Find what belongs to weights of a public layout: inside, beside them or on the hub."""
    config = csm_1b() if values is None else _described(CSMConfig, values, folder)
    codec_values = (values or {}).get("codec_config")
    mimi_config = MimiConfig()
    if codec_values is not None:
        mimi_config = _described(MimiConfig, codec_values, folder)
    return ModelFiles(
        config,
        weights,
        mimi_config,
        _find_mimi(weights, folder, config, progress),
        _find_tokenizer(folder, config, progress),
    )


def _find_mimi(
    weights: Path, folder: Path, config: CSMConfig, progress: hub.Progress | None
) -> Path:
    if any(name.startswith(CODEC_PREFIX) for name in read_weights(weights)):
        return weights
    for name in _MIMI_FILES:
        path = folder / name
        if path.is_file() and path != weights and _holds_mimi(path):
            return path
    place = f"put the codec's weights there as {MIMI_FILE}"
    if config.audio_num_codebooks > MimiConfig().num_quantizers:
        raise WeightsError(
            f"{folder}: no codec with the model, and the public one has only "
            f"{MimiConfig().num_quantizers} of its {config.audio_num_codebooks} codebooks: {place}."
        )
    if config.audio_vocab_size < MimiConfig().codebook_size:
        raise WeightsError(
            f"{folder}: no codec with the model, and the public one has more codes per codebook "
            f"({MimiConfig().codebook_size}) than the model ({config.audio_vocab_size}): {place}, "
            f"described as codec_config in {CONFIG_FILE}."
        )
    try:
        return fetch_default_mimi(progress)
    except HubError as error:
        raise HubError(f"{folder}: no codec with the model; {place}.\n{error}") from error


def _find_tokenizer(folder: Path, config: CSMConfig, progress: hub.Progress | None) -> Path:
    if (folder / TOKENIZER_FILE).is_file():
        return folder / TOKENIZER_FILE
    public_vocab = csm_1b().text_vocab_size
    if config.text_vocab_size < public_vocab:
        raise TokenizerError(
            f"{folder}: no {TOKENIZER_FILE} with the model, and the public one has {public_vocab} "
            f"tokens where the model has {config.text_vocab_size}. Put the model's own "
            f"{TOKENIZER_FILE} there."
        )
    try:
        return fetch_default_tokenizer(progress)
    except HubError as error:
        raise HubError(
            f"{folder}: no {TOKENIZER_FILE} with the model; put it there.\n{error}"
        ) from error


def _holds_mimi(path: Path) -> bool:
    """Return whether a weights file holds a codec alone (only its header is read)."""
    return any(name.startswith("encoder_transformer.") for name in read_weights(path))


def _described(kind: Any, values: Mapping[str, Any], place: Path) -> Any:
    try:
        return kind.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
