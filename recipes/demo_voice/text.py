"""The text tokenizer of the demo voice: lower-cased bytes; two hours of speech cover them all."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
NUM_SPARE = 2  # unused ids after the bytes: transformers' configuration names two placeholders


def build_tokenizer() -> Tokenizer:
    """Return the tokenizer: ids 0 and 1 are begin and end, 2-257 the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {BEGIN: 0, END: 1} | {symbol: i for i, symbol in enumerate(alphabet, start=2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (BEGIN, END)]
    )
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, 0), (END, 1)]
    )
    return tokenizer


def text_vocab_size(tokenizer: Tokenizer) -> int:
    """Return the number of rows of the text embedding."""
    return tokenizer.get_vocab_size() + NUM_SPARE


def prompt_ids(tokenizer: Tokenizer, speaker: int, text: str) -> list[int]:
    """Return the ids of `<|begin_of_text|>[speaker]text<|end_of_text|>`."""
    return tokenizer.encode(f"[{speaker}]{text}").ids
