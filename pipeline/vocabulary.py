"""A tokenizer's vocabulary as people write it: from a spelling to token ids, and from an id to what it spells."""

from __future__ import annotations

import json
from typing import Any

from calig.pipeline.errors import InputError

_ID = "id:"
# In front of a piece it keeps tokenizers from adding the blank that a text of its own would begin with.
_ANCHOR = "\n"


def token_text(tokenizer: Any, token: int) -> str:
    """What a token writes, with its leading blank; the piece itself where that is no whole character."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not text or "�" in text:
        return piece
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else str(text)


def quoted(tokenizer: Any, token: int) -> str:
    """A token in double quotes, so that blanks are seen, with line breaks and the like escaped."""
    return json.dumps(token_text(tokenizer, token), ensure_ascii=False)


def spelled_tokens(tokenizer: Any, spelling: str | int, flag: str = "target") -> list[int]:
    """The ids of the tokens that a spelling may mean: as it stands, or behind a blank if it has none in front.

    Most tokenizers hold a word at the beginning of a text and inside one as two tokens, `Paris` and ` Paris`.

    Args:
        tokenizer: Of the model.
        spelling: The text of one token, `id:N`, or an id.
        flag: Named in messages.

    Returns:
        One id, or two: with the blank first.

    Raises:
        InputError: The spelling is empty, takes several tokens (they are shown), or is not in the vocabulary.
    """
    if isinstance(spelling, bool) or not isinstance(spelling, (str, int)):
        raise InputError(f"{flag} takes the text of a token or its id, got {spelling!r}.")
    if isinstance(spelling, int) or spelling.startswith(_ID):
        return [_checked_id(tokenizer, spelling, flag)]
    if not spelling:
        raise InputError(f"{flag} is empty: give the text of one token, or {_ID}N.")
    ways = [_pieces(tokenizer, spelling)]
    if not spelling[0].isspace():
        ways.insert(0, _pieces(tokenizer, f" {spelling}"))
    known = [way for way in ways if tokenizer.unk_token_id not in way or spelling.strip() == tokenizer.unk_token]
    single = list(dict.fromkeys(way[0] for way in known if len(way) == 1))
    if single:
        return single
    if not known or not any(known):
        raise InputError(
            f"{flag} {spelling!r} is not in the model's vocabulary; give the text of one token, or {_ID}N."
        )
    pieces = min(filter(None, known), key=len)
    shown = " + ".join(quoted(tokenizer, piece) for piece in pieces)
    raise InputError(
        f"{flag} {spelling!r} is {len(pieces)} tokens, {shown}; a model writes one at a time. Name one of them: "
        f"{flag} {token_text(tokenizer, pieces[0])!r} asks for the first; put that into the text to ask for the next."
    )


def _checked_id(tokenizer: Any, spelling: str | int, flag: str) -> int:
    digits = str(spelling).removeprefix(_ID)
    size = len(tokenizer)
    if not digits.isdecimal() or int(digits) >= size:
        raise InputError(
            f"{flag} {spelling!r} is no token id; the tokenizer has {size}, from {_ID}0 to {_ID}{size - 1}."
        )
    return int(digits)


def _pieces(tokenizer: Any, text: str) -> list[int]:
    """The tokens that a text becomes inside another one."""

    def encoded(whole: str) -> list[int]:
        return list(tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"])

    front, whole = encoded(_ANCHOR), encoded(_ANCHOR + text)
    # Where the anchor melts into the text, the text on its own must do.
    return whole[len(front) :] if whole[: len(front)] == front else encoded(text)
