"""Settings of a training run, declared once for the command line, the studio and Python."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from csm_studio.constants import EMBEDDING_TABLES, LORA_ALPHA, LORA_RANK, LORA_TARGETS
from csm_studio.errors import OptionError
from csm_studio.options import check, option

_PATH_TYPES = (Path, Path | None)


@dataclasses.dataclass(kw_only=True)
class TrainingOptions:
    """What LoRA and full finetuning share."""

    data_path: Path = option(help="dataset.json to train on.", metavar="JSON")
    output_dir: Path = option(help="Folder for checkpoints, settings and metrics.", metavar="DIR")
    model: str = option(
        "demo",
        help="Base model: 'demo' (bundled, small), 'csm-1b' (downloaded), a model folder, a "
        "weights file or a hub repository.",
    )
    pretrained_path: Path | None = option(
        None, help="CSM weights to start from in place of the base model's own.", metavar="FILE"
    )
    batch_size: int = option(4, help="Conversations per batch.", minimum=1)
    epochs: int = option(5, help="Passes over the dataset.", minimum=1)
    learning_rate: float = option(help="Peak learning rate.", above=0)
    weight_decay: float = option(1e-4, help="Decay of adamw and sgd.", minimum=0)
    optimizer: str = option("adamw", help="Optimizer.", choices=("adamw", "adam", "sgd"))
    lr_schedule: str = option(
        "constant",
        help="Course of the learning rate after the warm-up.",
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = option(0, help="Steps over which the rate rises from 0.", minimum=0)
    grad_accumulation_steps: int = option(
        1, help="Batches per optimizer step; the same as one larger batch.", minimum=1
    )
    max_grad_norm: float = option(
        1.0, help="Gradients are scaled down to this norm; 0 never scales.", minimum=0
    )
    gradient_checkpointing: bool = option(
        False, help="Recompute activations in the backward pass: less memory, a third slower."
    )
    depth_frame_ratio: float = option(
        0.0625,
        help="Share of frames, drawn anew each step, that the depth decoder is trained on; 1.0 "
        "means all (slower, more memory).",
        above=0,
        maximum=1,
    )
    first_codebook_weight: float = option(1.0, help="Weight of codebook 0 in the loss.", above=0)
    loss: str = option(
        "csm-mlx",
        help="Weighting of codebooks: csm-mlx is (w L0 + sum Li) / K, transformers is w L0 + "
        "mean Li.",
        choices=("csm-mlx", "transformers"),
    )
    mask_speaker_ids: list[int] = option(
        [], help="Speakers whose turns are context only and never trained on.", metavar="ID"
    )
    max_audio_length_ms: int = option(
        30_000, help="Clips longer than this are left out, with a note.", minimum=80
    )
    max_samples: int | None = option(
        None, help="Use only the first N clips of the dataset.", minimum=1, metavar="N"
    )
    val_split: float = option(
        0.05, help="Share of conversations held out for validation.", minimum=0, maximum=0.9
    )
    seed: int = option(0, help="Seeds the order, the adapters and the sampled frames.", minimum=0)
    save_every: int = option(100, help="Steps between checkpoints; 0 saves epochs only.", minimum=0)
    keep_last: int = option(
        5,
        help="Epoch checkpoints and step checkpoints kept, each; the best one stays too. 0 keeps "
        "all.",
        minimum=0,
    )
    log_every: int = option(10, help="Steps between lines of the metrics log.", minimum=1)
    resume_from: Path | None = option(
        None, help="Checkpoint or output folder of a run to go on with.", metavar="PATH"
    )
    cache_dir: Path | None = option(
        None, help="Folder for Mimi codes, computed once per clip.", metavar="DIR"
    )

    def validate(self) -> None:
        """Check bounds and settings that contradict each other.

        Raises:
            OptionError: Lists what is wrong.
        """
        check(self)


@dataclasses.dataclass(kw_only=True)
class LoRAOptions(TrainingOptions):
    """Settings of `finetune_lora`."""

    output_dir: Path = option(
        Path("./lora_finetune_output"), help="Folder for checkpoints and metrics.", metavar="DIR"
    )
    learning_rate: float = option(5e-4, help="Peak learning rate.", above=0)
    lora_rank: int = option(LORA_RANK, help="Width of the adapters (4 to 16 is usual).", minimum=1)
    lora_alpha: float = option(LORA_ALPHA, help="Adapters are scaled by alpha / rank.", above=0)
    target_modules: list[str] = option(
        list(LORA_TARGETS),
        help="Modules that get adapters: attn, mlp, codebook0_head, projection, audio_head, "
        "text_embeddings, audio_embeddings, or dotted paths.",
        metavar="NAME",
    )
    train_embeddings: bool = option(
        False, help="Also train both embedding tables whole (better, more memory)."
    )

    def validate(self) -> None:
        """Check bounds, and that embeddings are not both adapted and trained whole."""
        super().validate()
        doubled = [name for name in self.target_modules if name.split(".")[0] in EMBEDDING_TABLES]
        if self.train_embeddings and doubled:
            raise OptionError(
                f"--train-embeddings trains the embedding tables whole, and --target-modules has "
                f"{' and '.join(doubled)}, which would give them LoRA adapters instead. Choose "
                "one: drop the embeddings from --target-modules (better quality, more memory) or "
                "drop --train-embeddings (less memory)."
            )


@dataclasses.dataclass(kw_only=True)
class FullOptions(TrainingOptions):
    """Settings of `finetune`."""

    output_dir: Path = option(
        Path("./finetune_output"), help="Folder for checkpoints and metrics.", metavar="DIR"
    )
    learning_rate: float = option(1e-5, help="Peak learning rate.", above=0)
    freeze_backbone: bool = option(False, help="Leave the backbone's layers as they are.")
    freeze_decoder: bool = option(False, help="Leave the depth decoder's layers as they are.")


def options_from_manifest(manifest: Mapping[str, Any]) -> LoRAOptions | FullOptions:
    """Return the settings that a run's manifest or checkpoint keeps.

    Raises:
        OptionError: There are none, or this version does not know one of them.
    """
    settings = LoRAOptions if manifest.get("kind") == "lora" else FullOptions
    values = manifest.get("training")
    if not isinstance(values, dict):
        raise OptionError("The run's settings are missing from its run.json. Start a new run.")
    hints = typing.get_type_hints(settings)
    if unknown := sorted(values.keys() - hints.keys()):
        raise OptionError(
            f"The run has settings that this version does not know: {', '.join(unknown)}. "
            "Use the version that it was begun with, or start a new run."
        )
    restored: dict[str, Any] = {
        name: Path(value) if value is not None and hints[name] in _PATH_TYPES else value
        for name, value in values.items()
    }
    return settings(**restored)
