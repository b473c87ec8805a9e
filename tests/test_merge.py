"""A merged model speaks as base and adapter do, and is a whole model folder."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from csm_studio import merge
from csm_studio.configs import CSMConfig, MimiConfig
from csm_studio.errors import AdapterError, OptionError
from csm_studio.export import merge as export_merge
from csm_studio.export.merge import merge_adapter, probe_logits
from csm_studio.generation.generator import generate
from csm_studio.model_folder import load_model, save_model_folder
from csm_studio.models.adapters import save_lora_weights
from csm_studio.models.csm import CSM
from csm_studio.models.lora import apply_lora_to_model, train_embeddings
from tests.tiny_voice import make_voice


@pytest.fixture
def base(tiny_csm_config: CSMConfig, tiny_mimi_config: MimiConfig, tmp_path: Path) -> Path:
    save_model_folder(make_voice(tiny_csm_config, tiny_mimi_config), tmp_path / "base", "Base")
    return tmp_path / "base"


def trained(base: Path, *, embeddings: bool = False, name_base: bool = True) -> Path:
    """Write an adapter that changes every kind of layer."""
    model = load_model(base)
    apply_lora_to_model(model, rank=2, target_modules=["attn", "codebook0_head", "audio_head"])
    if embeddings:
        train_embeddings(model)
        model.text_embeddings.weight = model.text_embeddings.weight * 1.5
    key = mx.random.key(0)
    for _, module in model.named_modules():
        if "lora_b" in module:
            key, drawn = mx.random.split(key)
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape, key=drawn)
    path = base.parent / "lora_ckpt_epoch_1.safetensors"
    save_lora_weights(model, path, {"base_model": str(base)} if name_base else None)
    return path


def adapted(base: Path, adapter: Path) -> CSM:
    return load_model(base, adapter=adapter)


@pytest.mark.parametrize("embeddings", [False, True])
def test_merged_model_is_base_and_adapter(base: Path, tmp_path: Path, embeddings: bool) -> None:
    adapter = trained(base, embeddings=embeddings)
    report = merge_adapter(adapter, tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    unmerged = probe_logits(adapted(base, adapter))
    assert mx.allclose(probe_logits(merged), unmerged, atol=1e-4)
    assert not mx.allclose(unmerged, probe_logits(load_model(base)), atol=0.1)
    assert report.base == str(base)
    assert report.difference <= 1e-4
    assert report.rounding == 0
    assert report.largest_logit == pytest.approx(np.abs(np.array(unmerged)).max(), rel=1e-4)
    on_disk = {path.name: path.stat().st_size for path in (tmp_path / "merged").iterdir()}
    assert report.sizes == on_disk


def test_merged_model_says_the_same(base: Path, tmp_path: Path) -> None:
    adapter = trained(base)
    merge_adapter(adapter, tmp_path / "merged")
    audio = [
        np.array(generate(model, "Hi.", 0, max_audio_length_ms=400, temperature=0))
        for model in (load_model(tmp_path / "merged"), adapted(base, adapter))
    ]
    np.testing.assert_allclose(audio[0], audio[1], atol=1e-4)


def test_half_precision_storage_reports_its_rounding(base: Path, tmp_path: Path) -> None:
    adapter = trained(base)
    report = merge_adapter(adapter, tmp_path / "merged", dtype="bfloat16")
    stored = probe_logits(load_model(tmp_path / "merged"))
    actual = mx.abs(stored - probe_logits(adapted(base, adapter))).max()
    assert 0 < report.rounding < 0.1 * report.largest_logit
    np.testing.assert_allclose(report.rounding, np.array(actual), rtol=0.01)


def test_merge_that_changes_the_model_writes_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: CSM) -> CSM:
        merged = real(model)
        merged.projection.weight = merged.projection.weight * 1.01
        return merged

    real = export_merge.merge_lora_weights
    monkeypatch.setattr(export_merge, "merge_lora_weights", wrong)
    with pytest.raises(AdapterError, match="merged model differs from base and adapter"):
        merge_adapter(trained(base), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_base_must_be_known_and_the_right_one(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, name_base=False)
    with pytest.raises(AdapterError, match="does not say which model"):
        merge_adapter(adapter, tmp_path / "merged")
    merge_adapter(adapter, tmp_path / "merged", base=str(base))
    with pytest.raises(AdapterError, match="belongs to another base model"):
        # The merged model is not the base of its adapter.
        merge_adapter(adapter, tmp_path / "again", base=str(tmp_path / "merged"))
    assert not (tmp_path / "again").exists()


def test_command(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = trained(base)
    monkeypatch.chdir(tmp_path)
    merge.main(["--adapter", os.path.relpath(adapter), "-o", "out/merged", "--dtype", "float16"])
    output = capsys.readouterr().out
    for part in (
        "wrote out/merged",
        "model.safetensors",
        "differ by at most",
        "--model out/merged",
    ):
        assert part in output
    assert load_model("out/merged").companions is not None
    with pytest.raises(OptionError, match="adapter not found"):
        merge.main(["--adapter", "gone.safetensors", "-o", "out/merged"])
    with pytest.raises(OptionError, match="not empty and not a model folder"):
        merge.main(["--adapter", str(adapter), "-o", "out"])
