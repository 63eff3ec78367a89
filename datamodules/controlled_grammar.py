"""The rules of the controlled corpus: its lexicon, its reading of a sentence, and what counts as evidence.

A sentence is read in four steps.

1. Whatever stands between two quotation marks is a title and says nothing.
2. Punctuation, ``and``, a contrast (``but``), a subordinator (``although``, ``which``) or a preposition that
   concedes (``despite``) opens a new clause.
3. A clause is the sign of its sentiment words; each negator flips those that follow it, up to the clause's end.
4. A clause counts unless a subordinator or such a preposition opens it, it tells what others think (``critics``)
   or what was expected (``feared``), or a contrast follows before the next ``.``, ``;``, ``!`` or ``?``.
   The sentence's polarity is the sign of the sum of the clauses that count.

``NEUTRAL`` gives each word that takes part in these rules one fixed replacement that does not: a sentiment word
becomes a neutral word of its kind (clause without sentiment: 0), a negator its affirmative partner, and a word that
sets a clause aside (``although``, ``but``, ``critics``, ``feared``) one that lets the clause count. A word is evidence
where its replacement alone changes the polarity, also to 0. All other words, and punctuation, have no replacement and
are never evidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from calig.pipeline.errors import InputError

Words = tuple[str, ...]

# Every word that may follow "a" starts with a consonant, so the article gives nothing away.
# Slot of the templates -> (negative words, positive words), and the neutral word of the same kind.
SENTIMENT: Final[dict[str, tuple[Words, Words]]] = {
    "ADJECTIVE": (
        ("terrible", "horrible", "bad", "poor", "dull", "boring", "disappointing", "nasty"),
        ("charming", "delightful", "good", "great", "lovely", "brilliant", "wonderful", "superb"),
    ),
    "SUCCESS": (("disaster", "failure", "mess", "letdown"), ("triumph", "delight", "treat", "gem")),
    "LIKED": (("hated", "disliked", "resented"), ("loved", "enjoyed", "admired")),
    "LIKE": (("hate", "dislike", "resent"), ("love", "enjoy", "admire")),
}
_NEUTRAL_SENTIMENT: Final = {"ADJECTIVE": "typical", "SUCCESS": "thing", "LIKED": "noticed", "LIKE": "notice"}

# Slot -> (negators, affirmative partner).
NEGATION: Final[dict[str, tuple[Words, str]]] = {
    "NOT": (("not",), "also"),
    "NEVER": (("never", "hardly"), "also"),
    "RARELY": (("not", "never", "hardly"), "also"),
    "NOBODY": (("nobody",), "everybody"),
    "NOTHING": (("nothing",), "everything"),
    "NONE": (("none",), "most"),
    "NO": (("no",), "each"),
    "DOUBT": (("doubt",), "believe"),
    "CANNOT": (("cannot",), "can"),
}

CONTRASTS: Final[Words] = ("but", "yet")
CONCESSIONS: Final[Words] = ("although", "though", "while")
PREPOSITIONS: Final[Words] = ("despite", "after")
SOURCES: Final[Words] = ("critics", "reviewers", "friends", "others")
EXPECTATIONS: Final[Words] = ("expected", "feared", "predicted")

_QUOTE: Final = '"'
_STOPS: Final = frozenset(".;!?")
_SUBORDINATORS: Final = frozenset((*CONCESSIONS, "because", "when", "who", "which"))
_SUBORDINATE: Final = _SUBORDINATORS.union(PREPOSITIONS)
_OPENERS: Final = _STOPS.union((",", ":", "and"), CONTRASTS, _SUBORDINATE)
_ASIDE: Final = frozenset((*SOURCES, *EXPECTATIONS))
_NEGATORS: Final = frozenset(word for negators, _ in NEGATION.values() for word in negators)
_POLARITY: Final[dict[str, int]] = {
    word: polarity for pair in SENTIMENT.values() for polarity, kind in zip((-1, 1), pair, strict=True) for word in kind
}

NEUTRAL: Final[dict[str, str]] = {
    **{word: _NEUTRAL_SENTIMENT[slot] for slot, pair in SENTIMENT.items() for kind in pair for word in kind},
    **{word: partner for negators, partner in NEGATION.values() for word in negators},
    **dict.fromkeys(CONTRASTS, "and"),
    **dict.fromkeys(sorted(_SUBORDINATORS), "today"),
    **dict.fromkeys(PREPOSITIONS, "with"),
    **dict.fromkeys(SOURCES, "we"),
    **dict.fromkeys(EXPECTATIONS, "had"),
}
"""Word -> its neutral replacement; a word that is not a key is left as it is."""


def evaluate(words: Sequence[str]) -> int:
    """Read a sentence by the rules of this module.

    Args:
        words: The sentence's words in lower case, punctuation as words of their own.

    Returns:
        The polarity of what the sentence asserts: -1, 0 (no sentiment, or a draw) or 1.

    Raises:
        InputError: ``words`` is a string, or a quotation mark has no partner.

    Example:
        >>> evaluate("although the soup was terrible , the waiter was not bad .".split())
        1
        >>> evaluate("although the soup was terrible , the waiter was not typical .".split())
        0
    """
    total = sentence = 0
    for opener, clause in _clauses(words):
        if opener in _STOPS:
            total, sentence = total + sentence, 0
        elif opener in CONTRASTS:
            sentence = 0
        if opener not in _SUBORDINATE and _ASIDE.isdisjoint(clause):
            sentence += _clause_polarity(clause)
    return _sign(total + sentence)


def evidence(words: Sequence[str]) -> list[int]:
    """Mark the words whose neutral replacement, alone, changes the polarity of the sentence.

    Args:
        words: As for :func:`evaluate`.

    Returns:
        1 for evidence and 0 elsewhere, one entry per word.

    Raises:
        InputError: As for :func:`evaluate`.

    Example:
        >>> evidence("the soup was not very good .".split())
        [0, 0, 0, 1, 0, 1, 0]
    """
    polarity = evaluate(words)
    changed = list(words)
    marks = [0] * len(changed)
    for position, word in enumerate(words):
        if word in NEUTRAL:
            changed[position] = NEUTRAL[word]
            marks[position] = int(evaluate(changed) != polarity)
            changed[position] = word
    return marks


def _clauses(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each clause with the word that opened it ("" for the first), titles left out."""
    if isinstance(words, str):
        raise InputError(f"words is the string {words!r}, expected a list of words. Pass words.split().")
    opener, in_title = "", False
    clause: list[str] = []
    for word in words:
        if word == _QUOTE:
            in_title = not in_title
        elif in_title:
            continue
        elif word in _OPENERS:
            yield opener, clause
            opener, clause = word, []
        else:
            clause.append(word)
    if in_title:
        raise InputError(f"{' '.join(words)!r} has a quotation mark without a partner. Close or remove it.")
    yield opener, clause


def _clause_polarity(clause: Sequence[str]) -> int:
    scope, total = 1, 0
    for word in clause:
        if word in _NEGATORS:
            scope = -scope
        else:
            total += scope * _POLARITY.get(word, 0)
    return _sign(total)


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
