"""Stage 6: load the export with the program's own classes and write the folder that ships.

    python recipes/demo_voice/package.py --export W/export --output assets/demo_voice

Runs in the program's environment (MLX), from the repository's root.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from csm_studio.configs import CSMConfig, MimiConfig
from csm_studio.model_folder import check_companions, save_model_folder
from csm_studio.models.csm import CSM, Companions
from csm_studio.models.mimi.codec import Mimi
from csm_studio.text.tokenizer import TextTokenizer

NAME = "demo voice"
DESCRIPTION = (
    "A small model of CSM's architecture, trained for demonstration on synthetic speech of four "
    "named voices (speakers 0-3) and others. It is not CSM-1B. How it was made: recipes/demo_voice."
)


def package(export: Path, output: Path) -> None:
    """Read the two HF layouts and the tokenizer, check that they fit, and write the folder."""
    described = {
        part: json.loads((export / part / "config.json").read_text())
        for part in ("language_model", "codec")
    }
    model = CSM(CSMConfig.from_dict(described["language_model"]))
    model.load_weights(export / "language_model")
    codec = Mimi(MimiConfig.from_dict(described["codec"])).load_file(export / "codec")
    model.companions = Companions(codec, TextTokenizer.from_file(export / "tokenizer.json"))
    check_companions(model.config, model.companions)
    for path in save_model_folder(model, output, NAME, DESCRIPTION, "float16", "float16"):
        print(f"{path.stat().st_size:>12,}  {path}")


def main() -> None:
    """Read the options and package."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--export", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    package(arguments.export, arguments.output)


if __name__ == "__main__":
    main()
