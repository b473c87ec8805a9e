"""`python -m csm_studio.merge --adapter FILE -o DIR`: a finetuned voice as a model of its own."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from csm_studio.command import download_line, run
from csm_studio.options import add_options, existing_path, from_namespace, option


@dataclasses.dataclass(kw_only=True)
class MergeOptions:
    """What to merge, and where to."""

    adapter: Path = option(help="LoRA adapter to merge.", metavar="FILE")
    output: Path = option(
        help="Folder for the merged model, given to other commands as --model.",
        flag="-o",
        metavar="DIR",
    )
    model: str | None = option(
        None, help="Base model (default: the one that the adapter was trained on)"
    )
    dtype: str = option(
        "float32",
        help="Storage of the weights: half precision takes half the room and rounds them.",
        choices=("float32", "float16", "bfloat16"),
    )


def main(arguments: Sequence[str] | None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        "python -m csm_studio.merge",
        description="Merge a LoRA adapter into its base and write a complete model folder.",
    )
    add_options(parser, MergeOptions)
    options = from_namespace(MergeOptions, parser.parse_args(arguments))
    adapter = existing_path(options.adapter, "adapter")

    # Imported after the options are checked: mistakes are told at once.
    from csm_studio.export.merge import TOLERANCE, merge_adapter

    with download_line() as show_download:
        report = merge_adapter(
            adapter, options.output.expanduser(), options.model, options.dtype, show_download
        )
    print(f"Merged {adapter.name} into {report.base} and wrote {report.folder}:")
    for name, size_bytes in report.sizes.items():
        print(f"  {name}  {size_bytes / 1e6:,.1f} MB")
    print(
        f"Checked on a forward pass: the merged logits differ by at most {report.difference:.2g} "
        f"from base and adapter, where they reach {report.largest_logit:.2g} (a share of "
        f"{TOLERANCE:g} is allowed). Storing as {options.dtype} changes them by "
        f"{report.rounding:.2g}."
    )
    print(
        f'Hear it:\n  python -m csm_studio.generate "Hello." -o hello.wav --model {report.folder}'
    )


if __name__ == "__main__":
    run(main)
