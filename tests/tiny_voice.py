"""A whole model at tiny size: random weights, a byte tokenizer and a codec of 4 x 32 codes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from csm_studio.configs import CSMConfig, MimiConfig
from csm_studio.models.csm import CSM, Companions
from csm_studio.models.mimi.codec import Mimi
from csm_studio.text.tokenizer import TextTokenizer
from tests.test_tokenizer import byte_tokenizer


def make_voice(csm: CSMConfig, mimi: MimiConfig, seed: int = 0) -> CSM:
    """Return a model with companions; the same seed gives the same weights."""
    mx.random.seed(seed)
    model = CSM(csm)
    codec = Mimi(mimi)
    # Random layers alone give silence: the layer scales would keep the codes from being heard.
    codec.decoder_transformer.apply(lambda weight: weight * 2)
    mx.eval(model.parameters(), codec.parameters())
    model.companions = Companions(codec, TextTokenizer(byte_tokenizer()))
    return model


def write_tokenizer(folder: Path) -> None:
    """Put the byte tokenizer's file into a folder."""
    byte_tokenizer().save(str(folder / "tokenizer.json"))
