"""What would mend a failed training, in words and as changes to its settings."""

from __future__ import annotations

import dataclasses
import errno
import re
from collections.abc import Mapping
from typing import Any

from csm_studio.errors import LossNotFiniteError
from csm_studio.training.config import FullOptions, LoRAOptions
from csm_studio.training.trainer import FREE_ON_RESUME

# Metal, CUDA and the CPU each have their own words for it.
_OUT_OF_MEMORY = re.compile(
    r"malloc|unable to allocate|insufficient memory|out ?of ?memory", re.IGNORECASE
)
_CANNOT_WRITE = "[write] Unable to write"
_LOWER_RATE = 0.2
_MAX_GRAD_NORM = 1.0
_MIN_WARMUP_STEPS = 20


@dataclasses.dataclass(frozen=True)
class Advice:
    """What to do about a failure.

    Attributes:
        text: One or two plain sentences.
        changes: Settings by name, with the values that would mend it; may be empty.
        resumes: Whether the run can go on with these changes, rather than begin anew.
    """

    text: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    resumes: bool = False


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, (RuntimeError, ValueError)) and bool(_OUT_OF_MEMORY.search(str(error)))


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error means that the disk is full. MLX gives no error number."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, RuntimeError) and str(error).startswith(_CANNOT_WRITE)


def advise(
    error: BaseException, options: LoRAOptions | FullOptions, has_checkpoint: bool
) -> Advice | None:
    """Return what would mend a failed training, or None if only the message can say.

    Args:
        error: Why it failed.
        options: The settings it ran with.
        has_checkpoint: Whether there is one to go on from.
    """
    if is_out_of_memory(error):
        return _for_memory(options, has_checkpoint)
    if is_disk_full(error):
        text = "The disk is full. Make room on it, for instance by deleting old runs"
        # Pruning comes after writing, so fewer checkpoints are of use from the second one on.
        fewer: dict[str, Any] = {"keep_last": 1} if options.keep_last != 1 else {}
        return _advice(f"{text}, then go on.", fewer, has_checkpoint)
    if isinstance(error, LossNotFiniteError):
        rate = float(f"{options.learning_rate * _LOWER_RATE:.2g}")
        changes: dict[str, Any] = {"learning_rate": rate}
        if options.max_grad_norm == 0:
            changes["max_grad_norm"] = _MAX_GRAD_NORM
        if options.warmup_steps < _MIN_WARMUP_STEPS:
            changes["warmup_steps"] = _MIN_WARMUP_STEPS
        return _advice(
            f"The steps were too large. Begin again with a learning rate of {rate:g} that rises "
            "slowly.",
            changes,
            has_checkpoint,
        )
    return None


def explain(error: BaseException) -> str:
    """Return an error's message in plain words."""
    message = str(error) or type(error).__name__
    if is_out_of_memory(error):
        return f"Memory ran out ({message})."
    if is_disk_full(error):
        return f"The disk is full ({message})."
    return message


def _for_memory(options: LoRAOptions | FullOptions, has_checkpoint: bool) -> Advice:
    recompute = _advice(
        "Recompute activations in place of keeping them: less memory, a third slower.",
        {"gradient_checkpointing": True},
        has_checkpoint,
    )
    # It changes no result, so a run that has come some way can go on.
    if has_checkpoint and not options.gradient_checkpointing:
        return recompute
    if options.batch_size > 1:
        size = options.batch_size // 2
        accumulate = options.grad_accumulation_steps * 2
        return _advice(
            f"Begin again with {size} in place of {options.batch_size} conversations at a time. "
            f"Adding up {accumulate} such batches makes each step count the same.",
            {"batch_size": size, "grad_accumulation_steps": accumulate},
            has_checkpoint,
        )
    if not options.gradient_checkpointing:
        return recompute
    if isinstance(options, FullOptions):
        return Advice(
            "Train with LoRA in place of all weights: it needs a fraction of the memory. "
            "Or use a smaller base model."
        )
    half_ms = options.max_audio_length_ms // 2
    return _advice(
        f"Leave out clips longer than {half_ms / 1000:g} s, or use a smaller base model.",
        {"max_audio_length_ms": half_ms},
        has_checkpoint,
    )


def _advice(text: str, changes: Mapping[str, Any], has_checkpoint: bool) -> Advice:
    return Advice(text, changes, has_checkpoint and changes.keys() <= FREE_ON_RESUME)
