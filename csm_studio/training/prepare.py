"""From a dataset and a model to training data and a model ready to train."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from csm_studio.checkpoints.weights import fingerprint, flatten
from csm_studio.constants import FRAME_MS, MAX_CONTEXT_FRAMES
from csm_studio.dataset.batches import Example, Turn
from csm_studio.dataset.codes import CodeStore, encode_clips
from csm_studio.dataset.records import Clip, Dataset
from csm_studio.errors import DatasetError, TrainingError
from csm_studio.files import cache_dir
from csm_studio.models.csm import CSM, Companions
from csm_studio.models.lora import apply_lora_to_model, train_embeddings
from csm_studio.training.config import FullOptions, LoRAOptions, TrainingOptions

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Examples to train on and to validate with.

    Attributes:
        notes: What was left out or split, and why.
        fingerprint: Hash of every token, so that a resumed run knows its data again.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    notes: tuple[str, ...]
    fingerprint: str


def prepare_data(
    dataset: Dataset,
    companions: Companions,
    options: TrainingOptions,
    progress: Progress | None = None,
) -> TrainingData:
    """Tokenize and encode a dataset, leave out what cannot be trained on, and split it.

    Args:
        dataset: Conversations.
        companions: Codec and tokenizer of the model.
        options: Limits, masked speakers, split and seed.
        progress: Called with (clips encoded, clips) where codes are not cached yet.

    Raises:
        DatasetError: Recordings cannot be read (all are listed), or nothing is left to train on.
    """
    clips = dataset.clips
    root = options.cache_dir or cache_dir() / "codes"
    store = CodeStore(root, fingerprint(flatten(companions.codec.parameters())))
    codes = encode_clips(clips, companions.codec, store, progress=progress)
    notes = list(dataset.notes)
    masked = set(options.mask_speaker_ids)
    if unknown := sorted(masked - {clip.speaker_id for clip in clips}):
        notes.append(f"--mask-speaker-ids: no clip has speaker {', '.join(map(str, unknown))}.")
    turns = {
        id(clip): Turn(
            companions.tokenizer.encode_segment(clip.text, clip.speaker_id),
            clip_codes,
            clip.speaker_id not in masked,
        )
        for clip, clip_codes in zip(clips, codes, strict=True)
    }
    examples: list[Example] = []
    for conversation in dataset.conversations:
        examples += _examples(conversation, turns, options.max_audio_length_ms, notes)
    unscored = [example for example in examples if example.num_targets == 0]
    if unscored:
        notes.append(f"{len(unscored)} conversations left out: every turn is of a masked speaker.")
    examples = [example for example in examples if example.num_targets > 0]
    if not examples:
        raise DatasetError(
            f"{dataset.path or 'dataset'}: nothing is left to train on. Raise "
            "--max-audio-length-ms, or mask fewer speakers.",
            notes,
        )
    train, validation = _split(examples, options, notes)
    return TrainingData(train, validation, tuple(notes), _fingerprint(train, validation))


def prepare_model(model: CSM, options: LoRAOptions | FullOptions) -> CSM:
    """Make trainable exactly what the options say; the rest is frozen.

    Args:
        model: The base model. It is changed in place.
        options: `LoRAOptions` trains adapters (and whole embeddings with `train_embeddings`),
            `FullOptions` everything but frozen parts.

    Raises:
        AdapterError: A target module does not exist, or embeddings are chosen twice.
        TrainingError: Nothing is left to train.
    """
    if options.pretrained_path is not None:
        model.load_weights(options.pretrained_path)
    if isinstance(options, LoRAOptions):
        apply_lora_to_model(
            model, options.lora_rank, options.lora_alpha, options.target_modules, options.seed
        )
        if options.train_embeddings:
            train_embeddings(model)
    else:
        model.unfreeze()
        if options.freeze_backbone:
            model.backbone.freeze()
        if options.freeze_decoder:
            model.decoder.freeze()
    trainable = flatten(model.trainable_parameters())
    if not trainable:
        raise TrainingError("Nothing is left to train. Freeze less.")
    # What is trained is held in float32: steps of 1e-5 are lost in bf16, which has 8 bits.
    widened = [(name, value.astype(mx.float32)) for name, value in trainable.items()]
    model.load_weights(widened, strict=False)
    mx.eval(model.parameters())
    model.backbone.gradient_checkpointing = options.gradient_checkpointing
    model.decoder.gradient_checkpointing = options.gradient_checkpointing
    return model


def _examples(
    conversation: Sequence[Clip], turns: dict[int, Turn], max_audio_ms: int, notes: list[str]
) -> list[Example]:
    """Cut a conversation into sequences that fit the model, leaving out clips that cannot."""
    examples: list[Example] = []
    run: list[Turn] = []
    for clip in conversation:
        turn = turns[id(clip)]
        problem = _too_long(turn, max_audio_ms)
        if problem:
            notes.append(f"{Path(clip.audio_path).name}: left out, {problem}.")
        if problem or sum(t.num_frames for t in run) + turn.num_frames > MAX_CONTEXT_FRAMES:
            if run and not problem:
                notes.append(
                    f"{Path(clip.audio_path).name}: begins a new conversation, since the turns "
                    f"before fill the context of {MAX_CONTEXT_FRAMES} frames."
                )
            examples += [Example(tuple(run))] if run else []
            run = []
        if not problem:
            run.append(turn)
    return examples + ([Example(tuple(run))] if run else [])


def _too_long(turn: Turn, max_audio_ms: int) -> str | None:
    audio_ms = turn.codes.shape[1] * FRAME_MS
    # The codec fills up the last frame, which the limit does not count.
    if audio_ms >= max_audio_ms + FRAME_MS:
        return f"{audio_ms / 1000:.1f} s is over --max-audio-length-ms {max_audio_ms}"
    if turn.num_frames > MAX_CONTEXT_FRAMES:
        return f"text and audio take {turn.num_frames} of {MAX_CONTEXT_FRAMES} frames"
    return None


def _split(
    examples: list[Example], options: TrainingOptions, notes: list[str]
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    num_validation = round(len(examples) * options.val_split)
    if options.val_split > 0 and num_validation == 0 and len(examples) >= 10:
        num_validation = 1
    if options.val_split > 0 and num_validation == 0:
        notes.append(f"No validation: {len(examples)} conversations are too few to hold one out.")
    num_validation = min(num_validation, len(examples) - 1)
    order = np.random.default_rng([options.seed, len(examples)]).permutation(len(examples))
    held_out = set(order[:num_validation].tolist())
    train = tuple(e for i, e in enumerate(examples) if i not in held_out)
    return train, tuple(e for i, e in enumerate(examples) if i in held_out)


def _fingerprint(*parts: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for examples in parts:
        digest.update(f"{len(examples)} examples".encode())
        for example in examples:
            for turn in example.turns:
                digest.update(f"{list(turn.text_ids)}{turn.scored}{turn.codes.shape}".encode())
                digest.update(np.ascontiguousarray(turn.codes, np.int32).tobytes())
    return digest.hexdigest()[:16]
