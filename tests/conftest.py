"""Fixtures shared by the tests: tiny models with random weights and the parity data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from csm_studio.configs import CSMConfig, LlamaConfig, MimiConfig

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Folder of parity data: the committed part, or a larger set named by the environment."""
    return Path(os.environ.get("CSM_STUDIO_PARITY_DIR", FIXTURES))


def load_arrays(path: Path) -> dict[str, mx.array]:
    """Read a safetensors file at once."""
    arrays = mx.load(str(path))
    mx.eval(arrays)
    return arrays  # type: ignore[return-value]


def neutral_mimi_config(path: Path) -> MimiConfig:
    """Read the short-named Mimi description of the parity data."""
    values: dict[str, Any] = json.loads(path.read_text())
    return MimiConfig(
        hidden_size=values["dim"],
        num_filters=values["filters"],
        num_residual_layers=values["n_residual_layers"],
        upsampling_ratios=tuple(values["ratios"]),
        kernel_size=values["kernel_size"],
        last_kernel_size=values["last_kernel_size"],
        residual_kernel_size=values["residual_kernel_size"],
        dilation_growth_rate=values["dilation_base"],
        compress=values["compress"],
        codebook_size=values["bins"],
        codebook_dim=values["qdim"],
        num_quantizers=values["nq"],
        num_semantic_quantizers=values["num_semantic"],
        num_hidden_layers=values["layers"],
        num_attention_heads=values["heads"],
        intermediate_size=values["ffn"],
        sliding_window=values["context"],
        norm_eps=values["layer_norm_eps"],
        rope_theta=values["rope_theta"],
    )


@pytest.fixture
def tiny_csm_config() -> CSMConfig:
    """A CSM of 4 codebooks that runs in milliseconds."""
    return CSMConfig(
        text_vocab_size=300,
        audio_vocab_size=35,
        audio_num_codebooks=4,
        backbone=LlamaConfig(2, 32, 4, 2, 8, 48),
        decoder=LlamaConfig(2, 24, 2, 1, 12, 40),
    )


@pytest.fixture
def tiny_mimi_config() -> MimiConfig:
    """A Mimi of 4 codebooks of 32 entries with a window short enough to be reached."""
    return MimiConfig(
        hidden_size=16,
        num_filters=4,
        codebook_size=32,
        codebook_dim=8,
        num_quantizers=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        sliding_window=12,
    )
