"""Every layout of a model loads alike, and what is missing is named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from csm_studio import model_files, model_folder
from csm_studio.checkpoints.formats import to_transformers_csm
from csm_studio.checkpoints.weights import flatten
from csm_studio.configs import CSMConfig, MimiConfig, csm_1b
from csm_studio.errors import (
    AdapterError,
    ConfigError,
    CsmStudioError,
    HubError,
    OptionError,
    WeightsError,
)
from csm_studio.export.merge import probe_logits
from csm_studio.model_folder import check_companions, load_model, save_model_folder
from csm_studio.models.adapters import save_lora_weights
from csm_studio.models.csm import CSM, Companions
from csm_studio.models.lora import apply_lora_to_model
from tests.tiny_voice import make_voice, write_tokenizer


@pytest.fixture
def voice(tiny_csm_config: CSMConfig, tiny_mimi_config: MimiConfig) -> CSM:
    return make_voice(tiny_csm_config, tiny_mimi_config)


@pytest.fixture
def folder(voice: CSM, tmp_path: Path) -> Path:
    save_model_folder(voice, tmp_path / "voice", "Tiny", "Random weights.")
    return tmp_path / "voice"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that has nothing, and the list of what it was asked for."""
    asked: list[str] = []

    def nothing(repo_id: str, filename: str = "", **_: Any) -> Path:
        asked.append(repo_id)
        raise HubError(f"{repo_id}: the hub is not there.")

    monkeypatch.setattr(model_files.hub, "fetch", nothing)
    monkeypatch.setattr(model_files.hub, "fetch_model", nothing)
    return asked


def assert_same(actual: CSM, expected: CSM) -> None:
    assert mx.allclose(probe_logits(actual), probe_logits(expected), atol=1e-5)
    theirs, ours = actual.companions, expected.companions
    assert theirs is not None
    assert ours is not None
    codes = mx.array([[[1, 2], [3, 4], [5, 6], [7, 8]]])
    np.testing.assert_allclose(
        np.array(theirs.codec.decode(codes)), np.array(ours.codec.decode(codes)), atol=1e-5
    )
    assert theirs.tokenizer.encode_segment("Hé!", 3) == ours.tokenizer.encode_segment("Hé!", 3)


def save(path: Path, weights: dict[str, mx.array], about: dict[str, Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"csm_studio": json.dumps(about)} if about else None
    mx.save_safetensors(str(path), weights, header)


def save_codec(voice: CSM, path: Path) -> None:
    assert voice.companions is not None
    save(path, flatten(voice.companions.codec.parameters()))


def transformers_config(voice: CSM) -> dict[str, Any]:
    """Describe a voice as HF transformers does."""
    assert voice.companions is not None
    config = voice.config

    def llama(part: Any) -> dict[str, Any]:
        values = dataclasses.asdict(part)
        values["rope_scaling"] = {"rope_type": "llama3", **values["rope_scaling"]}
        return values

    return {
        "model_type": "csm",
        **llama(config.backbone),
        "text_vocab_size": config.text_vocab_size,
        "vocab_size": config.audio_vocab_size,
        "num_codebooks": config.audio_num_codebooks,
        "depth_decoder_config": llama(config.decoder),
        "codec_config": {"model_type": "mimi", **voice.companions.codec.config.to_dict()},
    }


def transformers_weights(voice: CSM) -> dict[str, mx.array]:
    assert voice.companions is not None
    codec = flatten(voice.companions.codec.parameters())
    weights = to_transformers_csm(flatten(voice.parameters()), voice.config)
    return {**weights, **{f"codec_model.{name}": value for name, value in codec.items()}}


# --- this project's folder --------------------------------------------------------------------


def test_own_folder_round_trip(voice: CSM, folder: Path, no_hub: list[str]) -> None:
    assert_same(load_model(folder), voice)
    assert_same(load_model(str(folder)), voice)
    assert no_hub == []
    written = sorted(path.name for path in folder.iterdir())
    assert written == ["config.json", "mimi.safetensors", "model.safetensors", "tokenizer.json"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["name"], config["description"]) == ("Tiny", "Random weights.")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_storage_in_half_precision_rounds_the_model_and_keeps_the_codec(
    voice: CSM, tmp_path: Path, dtype: str
) -> None:
    save_model_folder(voice, tmp_path / "half", "Half", dtype=dtype)
    stored = mx.load(str(tmp_path / "half/model.safetensors"))
    assert {value.dtype for value in stored.values()} == {getattr(mx, dtype)}  # type: ignore[union-attr]
    loaded = load_model(tmp_path / "half")
    rounded = make_voice(voice.config, voice.companions.codec.config)  # type: ignore[union-attr]
    rounded.apply(lambda weight: weight.astype(getattr(mx, dtype)).astype(mx.float32))
    assert_same(loaded, rounded)


def test_weight_that_does_not_fit_the_dtype(voice: CSM, tmp_path: Path) -> None:
    voice.projection.weight = voice.projection.weight * 1e6
    with pytest.raises(WeightsError, match=r"projection\.weight: .* not finite as float16"):
        save_model_folder(voice, tmp_path / "half", "Half", dtype="float16")
    assert not (tmp_path / "half").exists()


def test_model_folder_is_replaced_and_other_files_in_it_stay(voice: CSM, folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    other = make_voice(voice.config, voice.companions.codec.config, seed=1)  # type: ignore[union-attr]
    save_model_folder(other, folder, "Other")
    assert_same(load_model(folder), other)
    assert (folder / "notes.txt").read_text() == "mine"


def test_interrupted_writing_is_not_loaded_and_may_be_repeated(
    voice: CSM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "write_text", broken)
        with pytest.raises(KeyboardInterrupt):
            save_model_folder(voice, folder, "Again")
    with pytest.raises(ConfigError, match="writing was interrupted"):
        load_model(folder)
    save_model_folder(voice, folder, "Again")
    assert_same(load_model(folder), voice)


def test_failed_new_folder_is_taken_away(
    voice: CSM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        save_model_folder(voice, tmp_path / "new", "New")
    assert not (tmp_path / "new").exists()


def test_a_folder_with_something_else_is_refused(voice: CSM, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("precious")
    with pytest.raises(OptionError, match="not empty and not a model folder"):
        save_model_folder(voice, tmp_path, "x")
    with pytest.raises(OptionError, match="is a file"):
        save_model_folder(voice, tmp_path / "photo.jpg", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_unmerged_or_incomplete_models_are_not_written(voice: CSM, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="dtype 'int8' is unknown"):
        save_model_folder(voice, tmp_path / "x", "x", dtype="int8")
    bare = CSM(voice.config)
    with pytest.raises(ConfigError, match="has no codec"):
        save_model_folder(bare, tmp_path / "x", "x")
    apply_lora_to_model(voice, rank=2)
    with pytest.raises(AdapterError, match="not merged"):
        save_model_folder(voice, tmp_path / "x", "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "mimi.safetensors", "tokenizer.json"])
def test_missing_file_of_own_folder_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"lacks {name}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format_version": 2}, "format_version is 2; this program reads 1"),
        ({"csm": {}}, "describes no CSM"),
        ({"mimi": {"use_causal_conv": False}}, "use_causal_conv"),
    ],
)
def test_wrong_description_of_own_folder(
    folder: Path, change: dict[str, Any], expected: str
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=expected) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)


def test_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not JSON"):
        load_model(folder)


# --- public layouts ---------------------------------------------------------------------------


def put_transformers(voice: CSM, folder: Path) -> None:
    save(folder / "model.safetensors", transformers_weights(voice))


def put_transformers_shards(voice: CSM, folder: Path) -> None:
    weights = transformers_weights(voice)
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save(folder / file, {name: weights[name] for name in part})
    weight_map = {name: file for file, part in halves.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def put_mlx_with_mimi_file(voice: CSM, folder: Path) -> None:
    save(folder / "ckpt.safetensors", flatten(voice.parameters()))
    save_codec(voice, folder / "mimi.safetensors")


def put_mlx_with_codec_under_its_hub_name(voice: CSM, folder: Path) -> None:
    # As the hub names them: the codec's model.safetensors must not be taken for the CSM.
    save(folder / "ckpt.safetensors", flatten(voice.parameters()))
    save_codec(voice, folder / "model.safetensors")


@pytest.mark.parametrize(
    "put",
    [
        put_transformers,
        put_transformers_shards,
        put_mlx_with_mimi_file,
        put_mlx_with_codec_under_its_hub_name,
    ],
)
def test_layouts(
    voice: CSM, tmp_path: Path, put: Callable[[CSM, Path], None], no_hub: list[str]
) -> None:
    put(voice, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(transformers_config(voice)))
    write_tokenizer(tmp_path)
    assert_same(load_model(tmp_path), voice)
    assert no_hub == []


def test_weights_file_with_its_description_beside(voice: CSM, tmp_path: Path) -> None:
    put_mlx_with_mimi_file(voice, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(transformers_config(voice)))
    write_tokenizer(tmp_path)
    assert_same(load_model(tmp_path / "ckpt.safetensors"), voice)


def test_repository_of_the_hub(
    voice: CSM, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []

    def fetch_model(repo_id: str, *, progress: Any = None) -> Path:
        calls.append(repo_id)
        return folder

    monkeypatch.setattr(model_files.hub, "fetch_model", fetch_model)
    monkeypatch.chdir(tmp_path)
    assert_same(load_model("someone/tiny-csm"), voice)
    assert_same(load_model(), voice)
    assert calls == ["someone/tiny-csm", "senstella/csm-1b-mlx"]
    # A path that exists is never asked of the hub.
    Path("someone").mkdir()
    folder.rename("someone/tiny-csm")
    assert_same(load_model("someone/tiny-csm"), voice)
    assert len(calls) == 2


def test_demo_is_the_folder_beside_the_package(
    voice: CSM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Path(model_files.__file__).parents[1] / "assets" / "demo_voice"
    assert expected == model_files._DEMO_FOLDER
    monkeypatch.setattr(model_files, "_DEMO_FOLDER", folder)
    assert_same(load_model("demo"), voice)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="demo voice is not there"):
        load_model("demo")


# --- checkpoints of finetuning ----------------------------------------------------------------


def test_full_checkpoint_takes_codec_and_tokenizer_from_its_base(
    voice: CSM, folder: Path, tmp_path: Path
) -> None:
    tuned = make_voice(voice.config, voice.companions.codec.config, seed=7)  # type: ignore[union-attr]
    tuned.companions = voice.companions
    about = {"kind": "full", "base_model": str(folder), "config": voice.config.to_dict()}
    path = tmp_path / "run" / "ckpt_epoch_1.safetensors"
    save(path, flatten(tuned.parameters()), about)
    # A run's own settings beside it describe no model.
    (path.parent / "config.json").write_text("{}")
    assert_same(load_model(path), tuned)
    save(path, flatten(tuned.parameters()), {**about, "base_model": "gone"})
    with pytest.raises(ConfigError, match="finetuned from 'gone'"):
        load_model(path)


def test_adapter_is_loaded_unmerged(voice: CSM, folder: Path, tmp_path: Path) -> None:
    apply_lora_to_model(voice, rank=2)
    voice.projection.lora_b = mx.ones_like(voice.projection.lora_b)
    path = tmp_path / "lora_ckpt_epoch_1.safetensors"
    save_lora_weights(voice, path, {"base_model": str(folder)})
    loaded = load_model(folder, adapter=path)
    assert loaded.adapter is not None
    assert_same(loaded, voice)
    with pytest.raises(AdapterError, match=r"LoRA adapter, not a model\. Give it as --adapter"):
        load_model(path)


# --- what is missing --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder", "./no/such", "a/b.safetensors"])
def test_nothing_there(name: str, no_hub: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"no such model\. Give 'demo', 'csm-1b'"):
        load_model(name)
    assert no_hub == []


def test_neither_folder_nor_repository() -> None:
    with pytest.raises(HubError, match=r"runs/typo: no such folder here.*\n.*hub is not there"):
        load_model("runs/typo")


def test_folder_without_weights_names_what_it_has(voice: CSM, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no CSM weights.*It has no other"):
        load_model(tmp_path)
    save(tmp_path / "ckpt_epoch_5.safetensors", flatten(voice.parameters()))
    with pytest.raises(WeightsError, match=r"It has ckpt_epoch_5\.safetensors: name the file"):
        load_model(tmp_path)


def test_missing_codec_and_tokenizer_name_their_place(voice: CSM, tmp_path: Path) -> None:
    weights = flatten(voice.parameters())
    save(tmp_path / "model.safetensors", weights)
    config = transformers_config(voice)
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = r"more codes per codebook.*put the codec's weights there as mimi\.safetensors"
    with pytest.raises(WeightsError, match=expected):
        load_model(tmp_path)
    save_codec(voice, tmp_path / "mimi.safetensors")
    with pytest.raises(CsmStudioError, match=r"no tokenizer\.json with the model.*300"):
        load_model(tmp_path)
    write_tokenizer(tmp_path)
    assert_same(load_model(tmp_path), voice)


def test_public_geometry_asks_the_hub(tmp_path: Path, no_hub: list[str]) -> None:
    save(tmp_path / "ckpt.safetensors", {"backbone.layers.0.x": mx.zeros(1)})
    with pytest.raises(HubError, match=r"as mimi\.safetensors\.\nkyutai/mimi: the hub"):
        load_model(tmp_path)
    assert no_hub == ["kyutai/mimi"]


def test_default_companions_are_for_the_public_geometry(
    voice: CSM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="audio_num_codebooks 4"):
        model_folder.default_companions(voice.config)
    with pytest.raises(ConfigError, match="text_vocab_size 300"):
        model_folder.default_companions(dataclasses.replace(csm_1b(), text_vocab_size=300))
    with pytest.raises(HubError, match="kyutai/mimi"):
        model_folder.default_companions(csm_1b())


def test_parts_that_do_not_belong_together(voice: CSM) -> None:
    companions = voice.companions
    assert companions is not None
    check_companions(voice.config, companions)
    config = dataclasses.replace(
        voice.config, audio_vocab_size=31, text_vocab_size=200, audio_num_codebooks=5
    )
    with pytest.raises(ConfigError) as caught:
        check_companions(config, Companions(companions.codec, companions.tokenizer))
    for part in ("32 codes per codebook", "259 tokens", "4 codebooks, fewer than the model's 5"):
        assert part in str(caught.value)
