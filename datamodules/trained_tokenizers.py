"""Tokenizers that are trained on the training split, where a model from scratch brings none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from transformers import PreTrainedTokenizerBase, RobertaTokenizer

from calig.datamodules.columns import Text
from calig.datamodules.tokenization import CHUNK, joined, train_wordpiece
from calig.pipeline.errors import InputError

Trained = Literal["wordpiece", "byte_bpe"]

_BYTES = 256


def train_tokenizer(
    kind: Trained, texts: Iterable[Text], vocab_size: int, max_length: int | None = None
) -> PreTrainedTokenizerBase:
    """Train a tokenizer; the same texts in the same order give the same one in every process.

    - `wordpiece`: as BERT uncased does it: lower case, accents off, pieces of words. Words of a script without blanks
      are single characters, and a character that the training split does not have makes its word unknown. The
      vocabulary holds every character twice: right for alphabets and syllabaries (Ge'ez), large for Han characters.
    - `byte_bpe`: byte-level BPE with the pieces of GPT-2. Nothing is unknown and nothing is lost: any script,
      code-mixed text, emoji. Pieces may be parts of characters; words are shown whole. Texts stand between `<s>` and
      `</s>`: a causal model reads its decision at the last token, and the end token is the one that has nothing of its
      own to say (Radford et al. 2018 call it the extract token). There are no token types, which GPT-2 would look up
      in its word table.

    (SentencePiece's unigram model is not offered: its training sums in an order that differs between processes, which
    would then read different tokens.)

    Args:
        kind: Which.
        texts: The training texts, and only those.
        vocab_size: Upper bound.
        max_length: Stored as the tokenizer's `model_max_length`.

    Raises:
        InputError: `vocab_size` does not even hold the characters, or the bytes.
    """
    if kind == "wordpiece":
        return train_wordpiece(texts, vocab_size, max_length)
    fresh = RobertaTokenizer(add_prefix_space=True)  # the first word of a text is the same word elsewhere
    least = _BYTES + len(fresh.all_special_tokens)
    if vocab_size < least:
        raise InputError(
            f"vocab_size={vocab_size} is too small: a byte-level vocabulary holds all {_BYTES} bytes and "
            f"{len(fresh.all_special_tokens)} special tokens, so at least {least} are needed."
        )
    lines = [joined(text) for text in texts]
    batches = (lines[start : start + CHUNK] for start in range(0, len(lines), CHUNK))
    tokenizer = fresh.train_new_from_iterator(batches, vocab_size, show_progress=False)
    if max_length is not None:
        tokenizer.model_max_length = max_length
    return tokenizer
