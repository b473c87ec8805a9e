"""`python -m csm_studio.finetune.finetune_lora`: train a LoRA adapter on a dataset."""

from __future__ import annotations

from collections.abc import Sequence

from csm_studio.command import run
from csm_studio.finetune import session
from csm_studio.training.config import LoRAOptions

MODULE = "csm_studio.finetune.finetune_lora"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    session.train(
        session.parse(MODULE, "Finetune a CSM with LoRA on a dataset.json.", LoRAOptions, argv),
        MODULE,
    )


if __name__ == "__main__":
    run(main)
