"""Make a dataset file from a folder of recordings with transcripts.

python -m csm_studio.finetune.create_dataset --audio-dir recordings --output-json dataset.json
"""

from __future__ import annotations

import argparse
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from csm_studio.command import run
from csm_studio.dataset.importers import ImportReport, find_clips
from csm_studio.dataset.records import is_dataset_file, write_dataset
from csm_studio.errors import DatasetError
from csm_studio.options import add_options, from_namespace, option

ADVISED_SPEAKER_MIN = 10
"""Minutes of speech per speaker below which fine-tuning seldom catches the voice."""

_BAR_DELAY_S = 2.0
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class CreateDatasetOptions:
    """Settings of the command."""

    audio_dir: Path = option(
        help="Folder of recordings, searched with its sub-folders, or a transcript table.",
        metavar="DIR",
    )
    output_json: Path = option(help="Dataset file to write.", metavar="FILE")
    default_speaker: int = option(
        0, help="Speaker number where neither table, file name nor folder tells it.", minimum=0
    )
    max_samples: int | None = option(
        None, help="Take only this many clips, the first by name.", minimum=1, metavar="N"
    )
    transcript_suffix: str | None = option(
        None,
        help="Ending of the transcripts' names, such as .asr.txt, instead of the usual ones.",
        metavar="SUFFIX",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command: find clips, write the dataset file, print what was taken and what not."""
    parser = argparse.ArgumentParser(
        prog="python -m csm_studio.finetune.create_dataset",
        description="Make a dataset file from a folder of recordings with transcripts: text files"
        " beside the audio (NAME.normalized.txt, NAME.original.txt, NAME.txt, NAME.lab),"
        " or a metadata.csv or metadata.jsonl.",
    )
    add_options(parser, CreateDatasetOptions)
    options = from_namespace(CreateDatasetOptions, parser.parse_args(argv))
    target = options.output_json
    replaces = _check_target(target)
    report = _find(options)
    write_dataset(target, [[clip] for clip in report.clips])
    print("\n".join(describe_import(report)))
    print(f"{'Replaced' if replaces else 'Wrote'} {target}.")
    print(
        "Next: python -m csm_studio.finetune.finetune_lora"
        f" --data-path {shlex.quote(str(target))} --output-dir lora_finetune_output"
    )


def describe_import(report: ImportReport) -> list[str]:
    """Return what was taken and what was skipped, as lines of text."""
    minutes: dict[int, float] = defaultdict(float)
    for clip, duration_s in zip(report.clips, report.durations_s, strict=True):
        minutes[clip.speaker_id] += duration_s / 60
    lines = [f"Took {len(report.clips)} clips, {sum(minutes.values()):.1f} min: {report.source}."]
    for speaker_id, spoken in sorted(minutes.items()):
        name = report.speaker_names.get(speaker_id)
        lines.append(f"  speaker {speaker_id}{f' ({name})' if name else ''}: {spoken:.1f} min")
    short = [str(speaker) for speaker, spoken in minutes.items() if spoken < ADVISED_SPEAKER_MIN]
    if short:
        lines.append(
            f"Warning: under {ADVISED_SPEAKER_MIN} min of speaker {', '.join(sorted(short))};"
            f" aim at {ADVISED_SPEAKER_MIN} to {2 * ADVISED_SPEAKER_MIN} min for each."
        )
    paths_by_reason: dict[str, list[Path]] = defaultdict(list)
    for path, reason in report.skipped:
        paths_by_reason[reason.rstrip(".")].append(path)
    if report.skipped:
        lines.append(f"Skipped {len(report.skipped)}:")
    for reason, paths in sorted(paths_by_reason.items()):
        names = ", ".join(path.name for path in paths[:_NAMES_SHOWN])
        more = f" and {len(paths) - _NAMES_SHOWN} more" if len(paths) > _NAMES_SHOWN else ""
        lines.append(f"  {len(paths)} x {reason}: {names}{more}")
    return [*lines, *(f"Note: {note}" for note in report.notes)]


def _check_target(target: Path) -> bool:
    """Return whether a dataset will be replaced; refuse to replace anything else."""
    if target.is_dir():
        raise DatasetError(f"{target}: is a folder. Give a file name, such as dataset.json.")
    if target.exists() and not is_dataset_file(target):
        raise DatasetError(f"{target}: exists and is no dataset. Choose another name.")
    return target.exists()


def _find(options: CreateDatasetOptions) -> ImportReport:
    from tqdm import tqdm

    with tqdm(desc="Looking into audio", unit="file", delay=_BAR_DELAY_S, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return find_clips(
            options.audio_dir,
            options.default_speaker,
            options.transcript_suffix,
            options.max_samples,
            progress,
        )


if __name__ == "__main__":
    run(main)
