"""Facts of CSM and Mimi that every part of the program shares."""

from __future__ import annotations

SAMPLE_RATE_HZ = 24_000
"""Sample rate of all audio inside the program."""

FRAME_RATE_HZ = 12.5
"""Mimi frames per second of audio."""

SAMPLES_PER_FRAME = 1_920
"""Audio samples in one Mimi frame: 24 000 / 12.5."""

FRAME_MS = 80
"""Milliseconds of audio in one Mimi frame."""

MAX_CONTEXT_FRAMES = 2_048
"""Positions that a CSM may attend to: prompt and new frames together."""

EMBEDDING_TABLES = ("text_embeddings", "audio_embeddings")
"""The two tables of a CSM, which LoRA can adapt or leave to be trained whole."""

LORA_RANK = 8
LORA_ALPHA = 16.0
LORA_TARGETS = ("attn", "codebook0_head", "projection")
"""Defaults of LoRA; alpha over rank scales the update."""
