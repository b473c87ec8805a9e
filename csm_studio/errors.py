"""Exceptions that a user may meet. Each message names the thing, the problem and the fix.

Commands print the message of a `CsmStudioError` and exit with status 2; any other exception is a
defect of the program and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class CsmStudioError(Exception):
    """Base of every error that the user can do something about."""


class OptionError(CsmStudioError):
    """A setting is missing, out of bounds or contradicts another."""


class ConfigError(CsmStudioError):
    """A model description (`config.json`) cannot be read or makes no sense."""


class WeightsError(CsmStudioError):
    """A weights file does not fit the model it is loaded into."""


class AdapterError(CsmStudioError):
    """A LoRA adapter does not fit the model, or the model has none."""


class HubError(CsmStudioError):
    """A file cannot be had from the model hub."""


class AudioError(CsmStudioError):
    """An audio file cannot be read or written."""


class TokenizerError(CsmStudioError):
    """A text tokenizer is missing or lacks the tokens that CSM needs."""


class GenerationError(CsmStudioError):
    """Speech cannot be generated from what was asked for."""


class TrainingError(CsmStudioError):
    """A training run cannot start or go on."""


class LossNotFiniteError(TrainingError):
    """The loss or the gradient became infinite or undefined, and the run was ended."""


class JobError(CsmStudioError):
    """A background job cannot be started or is gone."""


class WorkspaceError(CsmStudioError):
    """The workspace cannot be opened, or has no such project or file."""


class DatasetError(CsmStudioError):
    """One or more problems of a dataset, all reported together.

    Args:
        summary: What was being read.
        problems: One line per problem, each naming the entry or file.
    """

    def __init__(self, summary: str, problems: Sequence[str] = ()) -> None:
        self.summary = summary
        self.problems = tuple(problems)
        super().__init__("\n".join([summary, *(f"  - {problem}" for problem in problems)]))
