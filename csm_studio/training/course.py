"""The course of a training up to its first step: find, read, load, encode, prepare.

The commands and the background jobs both follow it; each shows its progress in its own way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from csm_studio.dataset.records import read_dataset
from csm_studio.model_folder import load_model
from csm_studio.models.csm import CSM
from csm_studio.training.config import FullOptions, LoRAOptions
from csm_studio.training.events import EventCallback
from csm_studio.training.prepare import TrainingData, prepare_data, prepare_model
from csm_studio.training.run_dir import ResumePoint, RunDir, find_resume_point
from csm_studio.training.trainer import Trainer

LOADING = "loading the model"
ENCODING = "encoding audio"


@dataclasses.dataclass(frozen=True, eq=False)
class Course:
    """A training that is ready for its first step.

    Attributes:
        options: The settings; `output_dir` is that of the run gone on with, unless one was named.
        model: Prepared: trainable is what the settings say.
        data: Examples to train on and to validate with.
        resume: Where the run goes on, or None for a new one.
        speakers: The speakers that are trained on, ascending.
    """

    options: LoRAOptions | FullOptions
    model: CSM
    data: TrainingData
    resume: ResumePoint | None
    speakers: tuple[int, ...]

    def trainer(
        self,
        on_event: EventCallback,
        should_stop: Callable[[], bool],
        should_save: Callable[[], bool] = lambda: False,
    ) -> Trainer:
        """Return the trainer; its `run` takes the steps."""
        return Trainer(
            self.model, self.data, self.options, on_event, should_stop, self.resume, should_save
        )


def prepare_course(
    options: LoRAOptions | FullOptions,
    *,
    began: Callable[[str], None] = lambda phase: None,
    downloaded: Callable[[int, int | None, str], None] | None = None,
    encoded: Callable[[int, int], None] | None = None,
) -> Course:
    """Do everything that comes before the first step.

    An exception raised by a callback ends the preparation; nothing is on disk by then but the
    cache of codes.

    Args:
        options: The settings, checked.
        began: Called with `LOADING` and `ENCODING` when these begin.
        downloaded: Called with (bytes done, bytes in all or None, file name).
        encoded: Called with (clips encoded, clips).

    Raises:
        TrainingError: The folder is taken, or there is nothing to resume from.
        CsmStudioError: Data, model or settings are wrong.
    """
    resume = find_resume_point(options.resume_from) if options.resume_from else None
    if resume is not None and options.output_dir == type(options).output_dir:
        # Not told otherwise, a run goes on in its own folder.
        options = dataclasses.replace(options, output_dir=resume.checkpoint.parent)
    RunDir(Path(options.output_dir), "").refuse_if_taken(resume)
    dataset = read_dataset(options.data_path, options.max_samples)
    began(LOADING)
    model = load_model(options.model, progress=downloaded)
    assert model.companions is not None
    began(ENCODING)
    data = prepare_data(dataset, model.companions, options, encoded)
    prepare_model(model, options)
    speakers = {clip.speaker_id for clip in dataset.clips} - set(options.mask_speaker_ids)
    return Course(options, model, data, resume, tuple(sorted(speakers)))
