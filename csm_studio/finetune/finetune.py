"""`python -m csm_studio.finetune.finetune`: train all weights of a model on a dataset."""

from __future__ import annotations

from collections.abc import Sequence

from csm_studio.command import run
from csm_studio.finetune import session
from csm_studio.training.config import FullOptions

MODULE = "csm_studio.finetune.finetune"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    session.train(
        session.parse(MODULE, "Finetune all weights of a CSM on a dataset.", FullOptions, argv),
        MODULE,
    )


if __name__ == "__main__":
    run(main)
