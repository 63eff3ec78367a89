"""From the pieces of a tokenizer back to words that people read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from calig.pipeline.errors import InputError

_START = ("▁", "Ġ", "Ċ")
_SPECIAL = re.compile(
    r"^(\[[A-Z]+\d*\]|</?(s|pad|unk|mask|cls|sep|bos|eos|eod)>|<\|[^|<>]+\|>|<(bos|eos|pad)_?token>)$"
)
_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
_NO_SPACE_BEFORE = re.compile(r"^[.,!?;:%)\]}…’”»、。，！？：；）」』】።፣፤፥፦،؛؟।]+$")
_NO_SPACE_AFTER = re.compile(r"^[(\[{¿¡“«（「『【#@]$")
# Scripts written without blanks between words: kana, Han, Hangul stays out (it has blanks), Thai, Lao, Khmer, Burmese.
_UNSPACED = re.compile(r"^[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+$")


@dataclass(frozen=True)
class Word:
    """A word to show: its text, the sum of its pieces' scores, and the positions it was made of."""

    text: str
    score: float
    positions: tuple[int, ...]
    special: bool = False
    space: bool = True
    """Whether a blank stands before it."""
    word_id: int | None = None


def is_special(token: str) -> bool:
    """Whether a token has the form of a special one, such as ``[CLS]`` or ``</s>``."""
    return bool(_SPECIAL.match(token))


def merge_pieces(
    tokens: Sequence[str], scores: Sequence[float] | None = None, word_ids: Sequence[int | None] | None = None
) -> list[Word]:
    """Join neighbouring pieces of the same word; a word's score is the sum of its pieces' scores.

    Understands WordPiece (``##ing``), SentencePiece (``▁the``, ``<0xE2>``), byte-level BPE (``Ġthe``, other scripts
    decoded from their bytes) and ``</w>``. A start mark inside one word id (tokenizers that number the whole text as
    one word) begins a new word.

    Args:
        tokens: (T,) pieces as the tokenizer names them, or plain words.
        scores: (T,) one score per piece; None counts as zeros.
        word_ids: (T,) the word of each piece, None for a special token. Without it every piece stands alone (pieces
            are still set without a blank where their marks say so) and special tokens are known by their form.

    Raises:
        InputError: If the lengths differ.
    """
    total = len(tokens)
    scores = [0.0] * total if scores is None else [float(score) for score in scores]
    for name, values in (("scores", scores), ("word_ids", word_ids)):
        if values is not None and len(values) != total:
            raise InputError(f"{name} has {len(values)} entries for {total} tokens; give one per token.")

    groups: list[list[int]] = []
    for i in range(total):
        same = i > 0 and word_ids is not None and word_ids[i] is not None and word_ids[i] == word_ids[i - 1]
        if same and not tokens[i].startswith(_START):
            groups[-1].append(i)
        else:
            groups.append([i])

    marked = any(token.startswith(_START) for token in tokens)
    byte_level = any(token.startswith(("Ġ", "Ċ")) for token in tokens)
    words: list[Word] = []
    for group in groups:
        word_id = None if word_ids is None else word_ids[group[0]]
        pieces = [tokens[i] for i in group]
        special = word_id is None if word_ids is not None else is_special(pieces[0])
        text = pieces[0] if special else join_pieces(pieces, byte_level=byte_level)
        space = _space_before(words[-1], pieces[0], text, special, marked) if words else False
        words.append(Word(text, sum(scores[i] for i in group), tuple(group), special, space, word_id))
    return words


def join_pieces(pieces: Sequence[str], *, byte_level: bool = False) -> str:
    """The text of one word, without the tokenizer's marks (never empty: a bare mark reads as ``␣``)."""
    text, pending = "", bytearray()
    for piece in pieces:
        if match := _BYTE.match(piece):
            pending.append(int(match.group(1), 16))
            continue
        text += pending.decode("utf-8", "replace")
        pending.clear()
        text += piece.removeprefix("##").removeprefix("▁").removesuffix("</w>")
    text += pending.decode("utf-8", "replace")
    if byte_level:
        table = _byte_table()
        if all(char in table for char in text):
            text = bytes(table[char] for char in text).decode("utf-8", "replace")
        text = text.removeprefix(" ")
    text = text.replace("\n", "⏎")
    return text if text.strip() else "␣"


def _space_before(previous: Word, first_piece: str, text: str, special: bool, marked: bool) -> bool:
    if special or previous.special:
        return True
    if first_piece.startswith("##"):
        return False
    if marked:
        return first_piece.startswith(_START)
    if _UNSPACED.match(text) and _UNSPACED.match(previous.text):
        return False
    return not (_NO_SPACE_BEFORE.match(text) or _NO_SPACE_AFTER.match(previous.text))


@lru_cache(maxsize=1)
def _byte_table() -> dict[str, int]:
    """Character to byte, the inverse of GPT-2's ``bytes_to_unicode``."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table
