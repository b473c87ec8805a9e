"""The public repositories that hold CSM weights, the Mimi codec and the text tokenizer."""

from __future__ import annotations

import dataclasses

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Source:
    """A repository of the hub that holds something CSM Studio can load.

    Attributes:
        repo_id: `owner/name`.
        filenames: The file to load; where several are named, the first that the repository has.
            An index file stands for all the shards it lists.
        about: What the repository holds, for lists.
        is_gated: Whether a licence must be accepted on the repository's page first.
    """

    repo_id: str
    filenames: tuple[str, ...]
    about: str
    is_gated: bool = False

    @property
    def filename(self) -> str:
        """The file to load, or the first one to try."""
        return self.filenames[0]


DEFAULT_CSM = Source("senstella/csm-1b-mlx", ("ckpt.safetensors",), "CSM-1B for MLX")
CSM_SOURCES = (
    DEFAULT_CSM,
    Source("sesame/csm-1b", (SINGLE_FILE,), "CSM-1B as Sesame published it", is_gated=True),
    Source("unsloth/csm-1b", (SHARD_INDEX, SINGLE_FILE), "CSM-1B for HF transformers"),
    Source("mlx-community/csm-1b", (SHARD_INDEX, SINGLE_FILE), "CSM-1B for MLX"),
)

DEFAULT_MIMI = Source("kyutai/mimi", (SINGLE_FILE,), "Mimi codec for HF transformers")
MIMI_SOURCES = (
    DEFAULT_MIMI,
    Source(
        "kyutai/moshiko-pytorch-bf16",
        ("tokenizer-e351c8d8-checkpoint125.safetensors",),
        "Mimi codec as Kyutai published it",
    ),
)

DEFAULT_TOKENIZER = Source("unsloth/Llama-3.2-1B", (TOKENIZER_FILE,), "Llama-3 text tokenizer")

SOURCES = {source.repo_id: source for source in (*CSM_SOURCES, *MIMI_SOURCES, DEFAULT_TOKENIZER)}
"""Every public source by its repository."""

WEIGHT_FILES = (SHARD_INDEX, SINGLE_FILE, DEFAULT_CSM.filename)
"""Where the weights of a repository outside `SOURCES` may be, in the order they are tried."""
