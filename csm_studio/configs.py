"""Descriptions of the two models: CSM and its codec Mimi.

A `CSMConfig` or `MimiConfig` is read from three dialects of `config.json`: this project's own
(the fields below), HF transformers 4.x and 5.x, and Sesame's (`backbone_flavor`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from csm_studio.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The llama3 rule that stretches low rotary frequencies.

    Attributes:
        factor: Division of the frequencies below the low band.
        low_freq_factor: Wavelengths above `original_max_position_embeddings / low_freq_factor`
            are divided by `factor`.
        high_freq_factor: Wavelengths below `original_max_position_embeddings /
            high_freq_factor` are kept.
        original_max_position_embeddings: Context length before stretching.

    Source: Llama 3.1 model card code; HF transformers `rope_type: llama3`.
    """

    factor: float = 32.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: float = 8192.0

    def canonical(self) -> RopeScaling:
        """Return the same rule with `low_freq_factor` 1.

        HF spells the rule of CSM with 0.125 / 0.5 / 1024 (backbone) and 2^-9 / 2^-7 / 16 (depth
        decoder). Only the products and ratios matter, so all three are one rule.
        """
        scale = 1.0 / self.low_freq_factor
        return RopeScaling(
            factor=self.factor,
            low_freq_factor=1.0,
            high_freq_factor=self.high_freq_factor * scale,
            original_max_position_embeddings=self.original_max_position_embeddings * scale,
        )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A Llama transformer without its embeddings."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = RopeScaling()
    max_position_embeddings: int = 2048

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlamaConfig:
        """Read this project's or an HF transformers description.

        Raises:
            ConfigError: A key is missing or the architecture is not a bias-free Llama.
        """
        if values.get("attention_bias") or values.get("mlp_bias"):
            raise ConfigError("config.json: a Llama with biases is not a CSM. Use another model.")
        # transformers 4.x writes rope_theta and rope_scaling, 5.x one rope_parameters.
        rope = values.get("rope_parameters") or values.get("rope_scaling")
        theta = values.get("rope_theta") or (rope or {}).get("rope_theta")
        names = {field.name for field in dataclasses.fields(cls)}
        known = {key: values[key] for key in names if key in values}
        known["rope_scaling"] = _rope_scaling(rope)
        if theta is not None:
            known["rope_theta"] = float(theta)
        if known.get("head_dim") is None and {"hidden_size", "num_attention_heads"} <= known.keys():
            known["head_dim"] = known["hidden_size"] // known["num_attention_heads"]
        return _build(cls, known)


@dataclasses.dataclass(frozen=True)
class CSMConfig:
    """The Sesame conversational speech model.

    Attributes:
        text_vocab_size: Rows of the text embedding.
        audio_vocab_size: Rows per codebook of the audio embedding (Mimi's codes and 3 spare).
        audio_num_codebooks: Codes per frame, K.
        backbone: The transformer over frames; gives codebook 0.
        decoder: The depth decoder over one frame's codebooks; gives codebooks 1 to K - 1.
    """

    text_vocab_size: int
    audio_vocab_size: int
    audio_num_codebooks: int
    backbone: LlamaConfig
    decoder: LlamaConfig

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CSMConfig:
        """Read any of the three dialects of `config.json`.

        Raises:
            ConfigError: The dialect is unknown or a key is missing.
        """
        if "backbone_flavor" in values:
            return _from_sesame(values)
        if "depth_decoder_config" in values:
            return _from_transformers(values)
        if "backbone" not in values or "decoder" not in values:
            raise ConfigError(
                "config.json describes no CSM: it has none of 'backbone' and 'decoder', "
                "'depth_decoder_config' (HF transformers) or 'backbone_flavor' (Sesame)."
            )
        known = {**values}
        known["backbone"] = LlamaConfig.from_dict(values["backbone"])
        known["decoder"] = LlamaConfig.from_dict(values["decoder"])
        names = {field.name for field in dataclasses.fields(cls)}
        return _build(cls, {key: known[key] for key in names if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Return the description in this project's dialect, ready for JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class MimiConfig:
    """The Mimi codec. Field names are those of HF transformers' `MimiConfig`.

    Attributes:
        num_filters: Channels after the first convolution.
        upsampling_ratios: Strides of the decoder's transposed convolutions, in order.
        sliding_window: Keys that a transformer step sees, itself included, at 25 Hz.
        num_quantizers: Codebooks, K; the first `num_semantic_quantizers` form their own branch.
    """

    hidden_size: int = 512
    num_filters: int = 64
    num_residual_layers: int = 1
    upsampling_ratios: tuple[int, ...] = (8, 6, 5, 4)
    kernel_size: int = 7
    last_kernel_size: int = 3
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    compress: int = 2
    codebook_size: int = 2048
    codebook_dim: int = 256
    num_quantizers: int = 32
    num_semantic_quantizers: int = 1
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    sliding_window: int = 250
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MimiConfig:
        """Read this project's or an HF transformers description.

        Raises:
            ConfigError: The codec is of a kind that this implementation does not have.
        """
        wanted = {"use_causal_conv": True, "use_conv_shortcut": False, "pad_mode": "constant"}
        for key, value in wanted.items():
            if values.get(key, value) != value:
                raise ConfigError(f"config.json: a Mimi has {key} = {value}, not {values[key]}.")
        names = {field.name for field in dataclasses.fields(cls)}
        known = {key: values[key] for key in names if values.get(key) is not None}
        rope = values.get("rope_parameters")
        if rope and "rope_theta" in rope:
            known["rope_theta"] = float(rope["rope_theta"])
        if "upsampling_ratios" in known:
            known["upsampling_ratios"] = tuple(known["upsampling_ratios"])
        return _build(cls, known)

    def to_dict(self) -> dict[str, Any]:
        """Return the description ready for JSON."""
        return dataclasses.asdict(self)


def llama_1b() -> LlamaConfig:
    """Return the backbone of CSM-1B (Llama-3.2-1B without its head)."""
    return LlamaConfig(16, 2048, 32, 8, 64, 8192)


def llama_100m() -> LlamaConfig:
    """Return the depth decoder of CSM-1B."""
    return LlamaConfig(4, 1024, 8, 2, 128, 8192)


def csm_1b() -> CSMConfig:
    """Return the geometry of the public CSM-1B: 1,552,791,552 parameters in 187 tensors.

    Source: SesameAILabs/csm `models.py`.
    """
    return CSMConfig(
        text_vocab_size=128_256,
        audio_vocab_size=2_051,
        audio_num_codebooks=32,
        backbone=llama_1b(),
        decoder=llama_100m(),
    )


_SESAME_FLAVORS = {"llama-1B": llama_1b, "llama-100M": llama_100m}


def _from_sesame(values: Mapping[str, Any]) -> CSMConfig:
    parts: dict[str, LlamaConfig] = {}
    for part in ("backbone", "decoder"):
        flavor = values.get(f"{part}_flavor")
        if flavor not in _SESAME_FLAVORS:
            raise ConfigError(
                f"config.json: {part}_flavor is {flavor!r}; known are "
                f"{', '.join(_SESAME_FLAVORS)}. Describe the model in full instead."
            )
        parts[part] = _SESAME_FLAVORS[flavor]()
    keys = ("text_vocab_size", "audio_vocab_size", "audio_num_codebooks")
    return _build(CSMConfig, {**parts, **{key: values[key] for key in keys if key in values}})


def _from_transformers(values: Mapping[str, Any]) -> CSMConfig:
    depth = values["depth_decoder_config"]
    known = {
        "text_vocab_size": values.get("text_vocab_size"),
        "audio_vocab_size": values.get("vocab_size"),
        "audio_num_codebooks": values.get("num_codebooks"),
        "backbone": LlamaConfig.from_dict(values),
        "decoder": LlamaConfig.from_dict(depth),
    }
    return _build(CSMConfig, {key: value for key, value in known.items() if value is not None})


def _rope_scaling(rope: Mapping[str, Any] | None) -> RopeScaling | None:
    if rope is None or rope.get("rope_type", rope.get("type", "llama3")) == "default":
        return None
    kind = rope.get("rope_type", rope.get("type", "llama3"))
    if kind != "llama3":
        raise ConfigError(f"config.json: rope scaling {kind!r} is unknown; CSM uses 'llama3'.")
    names = {field.name for field in dataclasses.fields(RopeScaling)}
    return _build(RopeScaling, {key: float(rope[key]) for key in names if key in rope}).canonical()


def _build(cls: Any, known: dict[str, Any]) -> Any:
    """Construct a config, naming the keys that are missing or not positive numbers."""
    required = [
        field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in known]
    if missing:
        raise ConfigError(f"config.json: {cls.__name__} lacks {', '.join(missing)}.")
    bad = [
        f"{key} = {value!r}"
        for key, value in known.items()
        if not dataclasses.is_dataclass(value)
        and not isinstance(value, tuple)
        and value is not None
        and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0)
    ]
    if bad:
        raise ConfigError(f"config.json: {cls.__name__} has no sense with {', '.join(bad)}.")
    return cls(**known)
