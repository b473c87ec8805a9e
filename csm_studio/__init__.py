"""CSM Studio: from raw recordings to your own voice on the Sesame CSM speech model.

The names below are imported when first used, so that `import csm_studio` and `--help` need no MLX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csm_studio.configs import CSMConfig, MimiConfig, csm_1b
    from csm_studio.generation.generator import generate
    from csm_studio.generation.prompt import Segment
    from csm_studio.generation.streaming import stream_generate
    from csm_studio.model_folder import load_model
    from csm_studio.models.csm import CSM
    from csm_studio.models.mimi.codec import Mimi

__version__ = "0.1.0"

__all__ = [
    "CSM",
    "CSMConfig",
    "Mimi",
    "MimiConfig",
    "Segment",
    "__version__",
    "csm_1b",
    "generate",
    "load_model",
    "stream_generate",
]

_HOMES = {
    "CSM": "csm_studio.models.csm",
    "CSMConfig": "csm_studio.configs",
    "Mimi": "csm_studio.models.mimi.codec",
    "MimiConfig": "csm_studio.configs",
    "Segment": "csm_studio.generation.prompt",
    "csm_1b": "csm_studio.configs",
    "generate": "csm_studio.generation.generator",
    "load_model": "csm_studio.model_folder",
    "stream_generate": "csm_studio.generation.streaming",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
