"""The settings of speech, declared once for the command line, the studio and Python. No MLX."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from csm_studio.constants import FRAME_MS
from csm_studio.errors import OptionError
from csm_studio.options import option

OUTPUT_SUFFIX = ".wav"


@dataclasses.dataclass(kw_only=True)
class SamplingOptions:
    """How codes are drawn, in both stages: temperature, then top-k, top-p and min-p."""

    temperature: float = option(
        0.9, help="Liveliness: lower is steadier, 0 always takes the likeliest code.", minimum=0
    )
    top_k: int = option(50, help="Draw from the K likeliest codes; 0 switches it off.", minimum=0)
    top_p: float = option(
        1.0,
        help="Draw from the fewest codes that together have this probability; 1 switches it off.",
        above=0,
        maximum=1,
    )
    min_p: float = option(
        0.0,
        help="Leave out codes less likely than this share of the likeliest; 0 switches it off.",
        minimum=0,
        maximum=1,
    )


@dataclasses.dataclass(kw_only=True)
class SpeechOptions(SamplingOptions):
    """Which voice speaks, how, and after what."""

    output: Path = option(
        Path("speech.wav"), help="WAV file to write.", flag="-o", metavar="FILE.wav"
    )
    model: str | None = option(
        None,
        help="'demo' (bundled, small), 'csm-1b' (downloaded), a model folder, a weights file or a "
        "hub repository owner/name (default: the adapter's base, or demo)",
    )
    adapter: Path | None = option(None, help="LoRA adapter to speak with.", metavar="FILE")
    speaker: int = option(0, help="Speaker number, as in the training.", minimum=0)
    max_audio_length_ms: int = option(
        10_000, help="Length limit, counted in whole frames of 80 ms.", minimum=FRAME_MS
    )
    seed: int | None = option(
        None,
        help="Same seed, same speech (default: drawn, and reported)",
        minimum=0,
        maximum=2**32 - 1,
    )
    context_audio: list[Path] = option(
        [], help="Audio files of earlier turns, oldest first.", metavar="FILE"
    )
    context_text: list[str] = option(
        [], help="What is said in each --context-audio.", metavar="TEXT"
    )
    context_speaker: list[int] = option(
        [], help="Speaker number of each --context-audio.", metavar="N"
    )


def check_output(path: Path) -> Path:
    """Return the path with `~` expanded, if speech can be written there.

    Raises:
        OptionError: It is no `.wav`, or a folder.
    """
    path = path.expanduser()
    if path.suffix.lower() != OUTPUT_SUFFIX:
        raise OptionError(f"{path}: only {OUTPUT_SUFFIX} files are written. Change the name.")
    if path.is_dir():
        raise OptionError(f"{path}: is a folder. Give the name of a file.")
    return path
