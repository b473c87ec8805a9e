"""`python -m csm_studio.generate TEXT -o FILE.wav`: speak a text.

Only ever run, never imported: an import would hide the function `csm_studio.generate`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from csm_studio.command import download_line, run
from csm_studio.constants import SAMPLE_RATE_HZ
from csm_studio.errors import OptionError
from csm_studio.generation.settings import SpeechOptions, check_output
from csm_studio.options import add_options, from_namespace

_EPILOG = (
    "Put the text first. Context is earlier speech whose voice and manner the model takes up: "
    "repeat --context-audio, --context-text and --context-speaker once per turn."
)


def main(arguments: Sequence[str] | None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("python -m csm_studio.generate", epilog=_EPILOG)
    parser.add_argument("text", metavar="TEXT", help="What to say; - reads it from standard input.")
    add_options(parser, SpeechOptions)
    namespace = parser.parse_args(arguments)
    options = from_namespace(SpeechOptions, namespace)
    output = check_output(options.output)
    text = sys.stdin.read() if namespace.text == "-" else namespace.text
    if not text.strip():
        raise OptionError("The text is empty. Give at least one word.")

    # Imported after the options are checked: mistakes are told at once.
    from tqdm import tqdm

    from csm_studio.audio.io import write_wav
    from csm_studio.generation.generator import generate_speech
    from csm_studio.generation.prompt import segments_from_files
    from csm_studio.model_files import DEMO, base_of
    from csm_studio.model_folder import load_model

    context = segments_from_files(
        options.context_audio, options.context_text, options.context_speaker
    )
    name = options.model or (options.adapter and base_of(options.adapter)) or DEMO
    with download_line() as show_download:
        model = load_model(name, options.adapter, show_download)
    started_s = time.perf_counter()
    with tqdm(desc="speech", unit="frame", leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        speech = generate_speech(
            model,
            text,
            options.speaker,
            context,
            options.max_audio_length_ms,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            seed=options.seed,
            progress=show,
        )
    elapsed_s = time.perf_counter() - started_s
    write_wav(output, speech.audio)
    duration_s = speech.audio.size / SAMPLE_RATE_HZ
    ending = (
        "The model ended the speech itself."
        if speech.ended_by_itself
        else f"Cut off at the limit of {options.max_audio_length_ms} ms: --max-audio-length-ms."
    )
    print(
        f"Wrote {output}: {duration_s:.2f} s of speech in {elapsed_s:.2f} s (real-time factor "
        f"{elapsed_s / duration_s:.2f}, seed {speech.seed}). {ending}"
    )


if __name__ == "__main__":
    run(main)
