"""text/tokenizer.py with a byte-level tokenizer made here, and with Llama 3's where there is one.

`CSM_STUDIO_LLAMA_TOKENIZER` names the `tokenizer.json` of Llama 3, which is not part of this
repository.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from csm_studio.errors import TokenizerError
from csm_studio.text.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, TextTokenizer

LLAMA_TOKENIZER = os.environ.get("CSM_STUDIO_LLAMA_TOKENIZER")
NUM_BYTES = 256
BEGIN_ID, END_ID, EXTRA_ID = NUM_BYTES, NUM_BYTES + 1, NUM_BYTES + 2


def byte_tokenizer() -> Tokenizer:
    """One id per byte, then the two markers and one more special token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BEGIN_OF_TEXT, END_OF_TEXT, "<|extra|>"])
    return tokenizer


@pytest.fixture
def tokenizer() -> TextTokenizer:
    return TextTokenizer(byte_tokenizer())


def test_segment_is_bracketed_speaker_and_text_between_markers(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode_segment("Hello.", 12)
    assert ids[0] == BEGIN_ID
    assert ids[-1] == END_ID
    assert len(ids) == len("[12]Hello.") + 2
    assert all(index < NUM_BYTES for index in ids[1:-1])
    assert tokenizer.decode(ids) == "[12]Hello."


@pytest.mark.parametrize("text", ["Grüß Gott, 你好 🙂", "a  b", "e\u0301", "[3]tagged", "a\tb"])
def test_text_is_kept_as_it_is(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode_segment(text, 0)) == f"[0]{text}"


def test_outer_space_is_dropped_and_line_breaks_become_a_space(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode_segment(" \tone \r\n\n two\u2028three\n", 0) == (
        tokenizer.encode_segment("one two three", 0)
    )


@pytest.mark.parametrize("marker", [BEGIN_OF_TEXT, END_OF_TEXT, "<|extra|>"])
def test_markers_in_the_text_stay_letters(tokenizer: TextTokenizer, marker: str) -> None:
    text = f"before {marker} after"
    ids = tokenizer.encode_segment(text, 0)
    assert max(ids[1:-1]) < NUM_BYTES
    assert tokenizer.decode(ids) == f"[0]{text}"


def test_post_processor_truncation_and_padding_of_the_file_do_not_count(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    eager = byte_tokenizer()
    eager.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN_OF_TEXT} $A {END_OF_TEXT}",
        special_tokens=[(BEGIN_OF_TEXT, BEGIN_ID), (END_OF_TEXT, END_ID)],
    )
    eager.enable_truncation(4)
    eager.enable_padding(length=64, pad_id=EXTRA_ID, pad_token="<|extra|>")
    eager.save(str(tmp_path / "tokenizer.json"))
    loaded = TextTokenizer.from_file(tmp_path)
    assert loaded.encode_segment("Hello.", 0) == tokenizer.encode_segment("Hello.", 0)


def test_file_and_folder_are_the_same(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    byte_tokenizer().save(str(file))
    expected = tokenizer.encode_segment("Hello.", 1)
    assert TextTokenizer.from_file(tmp_path).encode_segment("Hello.", 1) == expected
    assert TextTokenizer.from_file(str(file)).encode_segment("Hello.", 1) == expected


def test_vocab_size_counts_added_tokens(tokenizer: TextTokenizer) -> None:
    assert tokenizer.vocab_size == EXTRA_ID + 1
    assert max(tokenizer.encode_segment("ÿ~", 0)) < tokenizer.vocab_size


@pytest.mark.parametrize(
    ("text", "speaker", "expected"),
    [
        ("", 0, "nothing to say"),
        (" \n\t ", 0, "nothing to say"),
        ("Hello.", -1, "speaker -1: give a number from 0"),
        ("Hello \ud83d.", 0, "not valid Unicode at character 6"),
    ],
)
def test_refused_segments(tokenizer: TextTokenizer, text: str, speaker: int, expected: str) -> None:
    with pytest.raises(TokenizerError, match=expected):
        tokenizer.encode_segment(text, speaker)


def test_missing_file_and_folder_without_one(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "no" / "such"):
        with pytest.raises(TokenizerError, match=r"no such file\. Put the tokenizer\.json of"):
            TextTokenizer.from_file(path)


@pytest.mark.parametrize("content", ["", "not JSON", "{}", '{"weights": 1}', "[]"])
def test_files_that_are_no_tokenizer(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(TokenizerError, match="not a tokenizer file") as caught:
        TextTokenizer.from_file(file)
    assert str(file) in str(caught.value)


def test_tokenizer_without_the_markers() -> None:
    bare = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    bare.add_special_tokens([BEGIN_OF_TEXT])
    with pytest.raises(TokenizerError) as caught:
        TextTokenizer(bare, "bare.json")
    assert str(caught.value).startswith(f"bare.json: lacks the special tokens {END_OF_TEXT},")


def test_markers_that_text_could_spell_are_refused() -> None:
    ordinary = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    ordinary.add_tokens([AddedToken(BEGIN_OF_TEXT), AddedToken(END_OF_TEXT)])
    with pytest.raises(TokenizerError, match="lacks the special tokens"):
        TextTokenizer(ordinary)


@pytest.mark.skipif(LLAMA_TOKENIZER is None, reason="CSM_STUDIO_LLAMA_TOKENIZER is not set")
def test_llama_3_ids() -> None:
    assert LLAMA_TOKENIZER is not None
    llama = TextTokenizer.from_file(LLAMA_TOKENIZER)
    expected = [128000, 58, 15, 60, 9906, 505, 64027, 373, 13, 128001]
    assert llama.encode_segment("Hello from Sesame.", 0) == expected
    assert llama.decode(expected) == "[0]Hello from Sesame."
    assert llama.vocab_size == 128_256
    assert 128001 not in llama.encode_segment(f"a{END_OF_TEXT}b", 0)[1:-1]
