"""Stage 5: write what ships, in transformers' layouts and float16.

    python export.py --work-dir W [--output DIR] [--random]

Writes `codec/` and `language_model/` (config.json, model.safetensors), `tokenizer.json` and
`training_log.json`. `--random` exports untrained weights of the same shapes, for tests.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MimiModel, PreTrainedConfig

from codec import STAGES, assemble
from codec_model import NUM_BOOKS, codec_config, initialise, round_as_shipped
from common import load_checkpoint, read_log
from corpus import SAMPLE_RATE_HZ, read_clips, shard_paths
from csm_model import Csm, csm_config
from text import build_tokenizer, text_vocab_size

# Names in memory (transformers >= 5.20) -> names in Mimi's published checkpoints.
CODEC_PREFIXES = {
    "encoder.encoder_seanet.": "encoder.",
    "encoder.encoder_transformer.": "encoder_transformer.",
    "encoder.downsample.": "downsample.",
    "decoder.decoder_seanet.": "decoder.",
    "decoder.decoder_transformer.": "decoder_transformer.",
    "decoder.upsample.": "upsample.",
}


def published_name(name: str) -> str:
    """Return the name a codec tensor has in published checkpoints."""
    for ours, theirs in CODEC_PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def write_model(
    folder: Path, tensors: dict[str, Tensor], config: PreTrainedConfig, kind: str
) -> int:
    """Write one model folder; return the number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {name: value.half().contiguous().cpu() for name, value in sorted(tensors.items())}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    values = config.to_dict() | {"architectures": [kind], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(values, indent=2, default=str) + "\n")
    return sum(value.numel() for value in halves.values())


def export(work_dir: Path, output: Path, random: bool) -> None:
    """Write the export folder."""
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    codec = MimiModel(codec_config(NUM_BOOKS))
    initialise(codec)
    tokenizer = build_tokenizer()
    config = csm_config(text_vocab_size(tokenizer), codec_config(NUM_BOOKS))
    language_model = Csm(config)
    used = {}
    if not random:
        trained = MimiModel(codec_config())
        used["codec"] = assemble(trained, work_dir / "codec", cpu)
        kept = codec.state_dict().keys()  # the codebooks in use
        codec.load_state_dict({k: v for k, v in trained.state_dict().items() if k in kept})
        state = load_checkpoint(work_dir / "lm" / "train.pt", cpu)
        if state is not None:
            language_model.load_state_dict(state["model"])
            used["language_model"] = {"step": state["step"]}
    round_as_shipped(codec)
    codec_tensors = {published_name(k): v for k, v in codec.state_dict().items()}
    parameters = {
        "codec": write_model(output / "codec", codec_tensors, codec.config, "MimiModel"),
        "language_model": write_model(
            output / "language_model",
            language_model.state_dict(),
            config,
            "CsmForConditionalGeneration",
        ),
    }
    tokenizer.save(str(output / "tokenizer.json"))
    hours: dict[str, float] = {}
    for shard in shard_paths(work_dir):
        for clip in read_clips(shard):
            key = f"{shard.name} {clip.split}"
            hours[key] = hours.get(key, 0.0) + clip.length / SAMPLE_RATE_HZ / 3600.0
    record = {
        "random_weights": random,
        "parameters": parameters,
        "data_hours": {key: round(value, 3) for key, value in hours.items()},
        "steps": used,
        **{stage: read_log(work_dir / "codec" / f"{stage}.jsonl") for stage in STAGES},
        "language_model": read_log(work_dir / "lm" / "train.jsonl"),
    }
    (output / "training_log.json").write_text(json.dumps(record, indent=1) + "\n")
    for path in sorted(output.rglob("*.*")):
        print(f"{path.stat().st_size:>12,}  {path.relative_to(output)}")


def main() -> None:
    """Read the options and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="default: W/export")
    parser.add_argument("--random", action="store_true", help="untrained weights")
    arguments = parser.parse_args()
    output = arguments.output or arguments.work_dir / "export"
    export(arguments.work_dir, output, arguments.random)


if __name__ == "__main__":
    main()
