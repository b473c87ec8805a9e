"""Text to token ids, in the form that CSM was trained on: `[speaker]text` between two markers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from csm_studio.checkpoints.sources import DEFAULT_TOKENIZER, TOKENIZER_FILE
from csm_studio.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"


class TextTokenizer:
    """A `tokenizer.json` that encodes CSM's text segments.

    The begin and end markers are added by id, whatever the file's own post-processor would do, and
    are never read out of the text: a text that spells out a marker is encoded letter by letter.

    Args:
        tokenizer: A tokenizer that has both markers as special tokens. It is changed: truncation
            and padding are switched off.
        name: What error messages call it.

    Raises:
        TokenizerError: A marker is missing or is not a special token.
    """

    def __init__(self, tokenizer: Tokenizer, name: str = TOKENIZER_FILE) -> None:
        specials = {
            token.content: token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        missing = [marker for marker in (BEGIN_OF_TEXT, END_OF_TEXT) if marker not in specials]
        if missing:
            raise TokenizerError(
                f"{name}: lacks the special tokens {' and '.join(missing)}, which CSM needs. "
                f"Use the {TOKENIZER_FILE} of {DEFAULT_TOKENIZER.repo_id}."
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # True means: treat special tokens in the text like any other letters.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._begin_id = specials[BEGIN_OF_TEXT]
        self._end_id = specials[END_OF_TEXT]

    @classmethod
    def from_file(cls, path: str | Path) -> TextTokenizer:
        """Read a `tokenizer.json`, or the one in a folder.

        Raises:
            TokenizerError: No such file, not a tokenizer, or without CSM's two markers.
        """
        from tokenizers import Tokenizer

        path = Path(path).expanduser()
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            raise TokenizerError(
                f"{file}: no such file. Put the {TOKENIZER_FILE} of {DEFAULT_TOKENIZER.repo_id} "
                "there, or check the path."
            )
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # The library raises nothing narrower.
            raise TokenizerError(
                f"{file}: not a tokenizer file ({error}). Replace it by the {TOKENIZER_FILE} of "
                f"{DEFAULT_TOKENIZER.repo_id}."
            ) from error
        return cls(tokenizer, str(file))

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_segment(self, text: str, speaker: int) -> list[int]:
        """Return the ids of `<|begin_of_text|>[{speaker}]{text}<|end_of_text|>`.

        White space around the text is dropped, and a line break with the white space around it
        becomes one space. The text is not changed otherwise.

        Args:
            text: What is said.
            speaker: The speaker's number, from 0.

        Returns:
            The token ids, the markers included.

        Raises:
            TokenizerError: The text is empty or not valid Unicode, or the speaker is negative.

        Source:
            `Generator._tokenize_text_segment` of the official CSM code.
        """
        if speaker < 0:
            raise TokenizerError(f"speaker {speaker}: give a number from 0.")
        lines = (line.strip() for line in text.splitlines())
        spoken = " ".join(line for line in lines if line)
        if not spoken:
            raise TokenizerError(f"text {text!r}: nothing to say. Give at least one word.")
        try:
            spoken.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text {text!r}: not valid Unicode at character {error.start}. "
                "Type it again, or save its file as UTF-8."
            ) from error
        encoding = self._tokenizer.encode(f"[{speaker}]{spoken}", add_special_tokens=False)
        return [self._begin_id, *encoding.ids, self._end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, `[speaker]` included and the markers left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def to_json(self) -> str:
        """Return the content of a `tokenizer.json` that gives the same ids."""
        return self._tokenizer.to_str()
