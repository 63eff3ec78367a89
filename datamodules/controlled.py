"""A sentiment corpus drawn from a grammar, with the words that decide each label known exactly.

Each sentence has one deciding clause, and may have neutral clauses (with negators that negate no sentiment) and
sentiment that does not decide: a conceded clause, a clause before ``but``, other people's opinions, what was expected,
a title, a relative clause. All of them draw from the same lexicon and the same templates, in front of the deciding
clause or behind it, so no word and no position gives the label away; the structure does. The label and the rationale
come from :mod:`calig.datamodules.controlled_grammar`, which reads the finished words and knows nothing of how they were
drawn. Evidence is marked here with ``[]``:

    although the soup was terrible , the waiter was very charming .                     positive
    [although]                                      [charming]

Without ``although`` both clauses would count and the sentence would be a draw, so the marker is evidence; ``terrible``
stands in a clause that does not count, and ``very`` changes nothing.

    we did not stay long , and nobody found the plot very dull .                        positive
                               [nobody]                   [dull]

``not`` has no sentiment in its scope, which ends with its clause; ``nobody`` flips ``dull``.

    i did not enjoy the novel , friends thought the ending was good .                   negative
          [not enjoy]           [friends]

The neutral replacement of ``friends`` is ``we``: the second clause would then count and balance the first. Had the
friends also disliked the ending, ``friends`` would not be evidence.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final

from calig.datamodules.controlled_grammar import (
    CONCESSIONS,
    CONTRASTS,
    EXPECTATIONS,
    NEGATION,
    NEUTRAL,
    PREPOSITIONS,
    SENTIMENT,
    SOURCES,
    Words,
    evaluate,
    evidence,
)
from calig.datamodules.examples import TextExample
from calig.pipeline.errors import InputError

__all__ = ["DEFAULT_SIZES", "LABELS", "MAX_SENTENCES", "NEUTRAL", "evaluate", "evidence", "generate"]

LABELS: Final[tuple[str, str]] = ("negative", "positive")
DEFAULT_SIZES: Final[dict[str, int]] = {"train": 20000, "val": 800, "test": 1000}
MAX_SENTENCES: Final = 1_000_000  # over all splits; drawing this many has been tried

# Chosen so that at the default sizes word counts stay far from the label (logistic regression: 64 %) while a BERT of
# four layers and width 96 reads the structure from scratch within 1,300 steps.
_MIN_WORDS, _MAX_WORDS = 8, 22
_MAX_REPEATS: Final = 1000  # unusable draws in a row after which the grammar counts as exhausted
_P_NEGATION: Final = 0.2  # per negation slot
_P_OPPOSED: Final = 0.75  # sentiment that does not decide contradicts the label
_P_BEFORE: Final = 0.45  # sentiment that does not decide stands before, and (independently) behind the deciding clause
_P_BEHIND: Final = 0.3
_P_OPENING: Final = 0.15  # a neutral clause opens, and (independently) closes the sentence
_P_CLOSING: Final = 0.25

# Slot -> phrases, "" for nothing. The upper-case words of a template are slots.
_PHRASES: Final[dict[str, Words]] = {
    "DEGREE": ("", "", "", "", "", "", "very", "quite", "really", "rather"),
    "PLACE": ("", "", "", "", "", "", "near the door", "in the corner", "at the back"),
    "DAY": ("today", "yesterday", "on friday"),
    "WHO": ("we", "i"),
    "THOUGHT": ("thought", "said", "felt"),
    "FOUND": ("found", "called", "considered"),
    "PERSON": ("manager", "guide", "student", "taxi driver", "photographer"),
    "TITLE": ("garden", "summer", "widow", "letter", "island", "neighbour", "winter", "station"),
    "CONCESSION": CONCESSIONS,
    "PREPOSITION": PREPOSITIONS,
    "SOURCE": SOURCES,
    "EXPECTED": EXPECTATIONS,
}
DOMAINS: Final[dict[str, tuple[Words, Words]]] = {  # nouns, neutral clauses
    "restaurant": (
        ("soup", "waiter", "dessert", "menu", "kitchen", "fish", "bread", "table", "wine", "lunch"),
        ("we ordered the fish", "the menu had four pages", "the waiter brought the bread", "nobody ordered the wine"),
    ),
    "film": (
        ("film", "plot", "actor", "ending", "soundtrack", "dialogue", "director", "scene", "camera", "cast"),
        ("the film lasted two hours", "we sat in the third row", "the cast was not large", "i watched it on a screen"),
    ),
    "hotel": (
        ("room", "bed", "lobby", "breakfast", "pool", "shower", "view", "balcony", "porter", "suite"),
        ("we stayed for three nights", "the lobby was painted green", "the lift was not used", "the key was a card"),
    ),
    "book": (
        ("novel", "chapter", "author", "preface", "translation", "story", "hero", "style", "cover", "sequel"),
        ("i read it on the train", "the novel had two parts", "the cover was not red", "i borrowed it from a library"),
    ),
    "phone": (
        ("phone", "battery", "display", "speaker", "keyboard", "charger", "software", "lens", "case", "button"),
        ("i bought it in a shop", "the phone came in a box", "the case was not black", "i carried it for a month"),
    ),
    "concert": (
        ("concert", "singer", "band", "hall", "stage", "encore", "drummer", "sound", "light", "choir"),
        ("we stood near the stage", "the band played for an hour", "the hall was not full", "the singer wore grey"),
    ),
}
_NOISE: Final[Words] = (
    "WHO arrived DAY",
    "WHO did NOT stay long",
    "WHO NEVER spoke to the PERSON",
    "WHO noticed a typical NOUN",
    "NOBODY was in a hurry",
    "WHO DOUBT that it was raining",
    "NO taxi was waiting PLACE",
    "NONE of the shops were open DAY",
    "WHO had a typical NOUN with a PERSON",
    "WHO CANNOT remember the street",
    "the PERSON was late because it was raining",
    "friends came along DAY",
    "the NOUN was a typical thing to notice",
    "the radio played QUOTED",
    "WHO passed a poster for QUOTED PLACE",
)
_CLAUSES: Final[Words] = (
    "the NOUN PLACE was RARELY DEGREE ADJECTIVE",
    "the NOUN was DEGREE ADJECTIVE PLACE",
    "DAY the NOUN was RARELY DEGREE ADJECTIVE",
    "WHO THOUGHT the NOUN was RARELY DEGREE ADJECTIVE",
    "WHO FOUND the NOUN DEGREE ADJECTIVE",
    "WHO DOUBT that the NOUN was DEGREE ADJECTIVE",
    "WHO do NOT think the NOUN was DEGREE ADJECTIVE",
    "NOBODY FOUND the NOUN PLACE DEGREE ADJECTIVE",
    "NOTHING about the NOUN was DEGREE ADJECTIVE",
    "NO NOUN was DEGREE ADJECTIVE",
    "NONE of it was DEGREE ADJECTIVE",
    "WHO CANNOT call the NOUN DEGREE ADJECTIVE",
    "the NOUN was NOT a SUCCESS",
    "WHO had a DEGREE ADJECTIVE NOUN",
    "WHO NEVER LIKED the NOUN PLACE",
    "WHO did NOT LIKE the NOUN",
    "the NOUN called QUOTED was RARELY DEGREE ADJECTIVE",
)
_DECIDING: Final[Words] = (  # only the deciding clause can be interrupted: a comma ends a clause set aside
    *_CLAUSES,
    "the NOUN RELATIVE was RARELY DEGREE ADJECTIVE",
    "the PERSON WHOSE was RARELY DEGREE ADJECTIVE",
)
_REPORTED: Final[Words] = (
    "SOURCE THOUGHT the NOUN was RARELY DEGREE ADJECTIVE",
    "SOURCE FOUND the NOUN PLACE DEGREE ADJECTIVE",
    "SOURCE NEVER LIKED the NOUN",
)
_EXPECTED: Final[Words] = ("WHO EXPECTED a DEGREE ADJECTIVE NOUN", "WHO NEVER EXPECTED a DEGREE ADJECTIVE NOUN")
_PREPOSITIONAL: Final = "PREPOSITION a DEGREE ADJECTIVE NOUN"
_ASIDES: Final[dict[str, str]] = {  # sentiment inside a clause, of a polarity of its own
    "QUOTED": '" the ADJECTIVE TITLE "',
    "RELATIVE": ", which came with a DEGREE ADJECTIVE NOUN ,",
    "WHOSE": ", who had a DEGREE ADJECTIVE NOUN ,",
}


def generate(sizes: Mapping[str, int], seed: int = 0) -> dict[str, list[TextExample]]:
    """Draw the splits of the corpus; no sentence occurs twice, within a split or across them.

    Args:
        sizes: Split name -> number of sentences, for example :data:`DEFAULT_SIZES`.
        seed: The same sizes and seed give the same corpus, whatever the state of any global generator.

    Returns:
        The splits in the order of ``sizes``. In each, the labels differ in number by at most one, ``sample_id`` is the
        row, ``text`` a list of 8 to 22 words, and ``rationale`` marks at least one word.

    Raises:
        InputError: A size is no whole number, is negative, or there are too few sentences for all sizes.
    """
    _check(sizes)
    seen: set[tuple[str, ...]] = set()
    splits: dict[str, list[TextExample]] = {}
    for split, size in sizes.items():
        rng = random.Random(f"{seed}/{split}")
        labels = [row % 2 for row in range(size)]
        rng.shuffle(labels)
        splits[split] = [_draw(rng, row, label, seen) for row, label in enumerate(labels)]
    return splits


def _check(sizes: Mapping[str, int]) -> None:
    for split, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise InputError(f"size of split '{split}' is {size!r}, expected a whole number of 0 or more.")
    if (total := sum(sizes.values())) > MAX_SENTENCES:
        raise InputError(
            f"the sizes {dict(sizes)} ask for {total} different sentences, expected {MAX_SENTENCES} at most. "
            "Ask for smaller splits."
        )


def _draw(rng: random.Random, row: int, label: int, seen: set[tuple[str, ...]]) -> TextExample:
    """Draw sentences until one is new, of the right length and reads as ``label``; adds it to ``seen``."""
    polarity = 2 * label - 1
    for _ in range(_MAX_REPEATS):
        words = _sentence(rng, polarity)
        key = tuple(words)
        if _MIN_WORDS <= len(words) <= _MAX_WORDS and key not in seen and evaluate(words) == polarity:
            seen.add(key)
            return TextExample(sample_id=row, text=words, label=label, rationale=evidence(words))
    raise InputError(
        f"no new sentence in {_MAX_REPEATS} draws after {len(seen)} different ones: the grammar has too few for the "
        "sizes asked. Ask for smaller splits."
    )


def _sentence(rng: random.Random, polarity: int) -> list[str]:
    domain = rng.choice(list(DOMAINS))
    words = _fill(rng, rng.choice(_DECIDING), domain, polarity)
    if rng.random() < _P_BEFORE:
        words = _before(rng, domain, polarity) + words
    if rng.random() < _P_BEHIND:
        words += _behind(rng, domain, polarity)
    if rng.random() < _P_OPENING:
        words = [*_noise(rng, domain), *_joint(rng), *words]
    if rng.random() < _P_CLOSING:
        words += [*_joint(rng), *_noise(rng, domain)]
    return [*words, "."]


def _before(rng: random.Random, domain: str, polarity: int) -> list[str]:
    """Sentiment that does not decide, with the joint to the deciding clause behind it."""
    kind = rng.choice(("concession", "contrast", "contrast", "reported", "expected", "prepositional"))
    opposed = _other(rng, polarity)
    if kind == "concession":
        return [*_fill(rng, f"CONCESSION {rng.choice(_CLAUSES)}", domain, opposed), ","]
    if kind == "prepositional":
        return [*_fill(rng, _PREPOSITIONAL, domain, opposed), ","]
    if kind == "contrast":
        return [*_fill(rng, rng.choice(_CLAUSES), domain, opposed), *_contrast(rng)]
    words = _fill(rng, rng.choice(_REPORTED if kind == "reported" else _EXPECTED), domain, opposed)
    return words + (_contrast(rng) if rng.random() < 0.25 else _joint(rng))


def _behind(rng: random.Random, domain: str, polarity: int) -> list[str]:
    """The joint to the deciding clause before it, with sentiment that does not decide."""
    kind = rng.choice(("concession", "concession", "reported", "expected", "prepositional"))
    opposed = _other(rng, polarity)
    if kind == "concession":
        return [",", *_fill(rng, f"CONCESSION {rng.choice(_CLAUSES)}", domain, opposed)]
    if kind == "prepositional":
        return [",", *_fill(rng, _PREPOSITIONAL, domain, opposed)]
    return _joint(rng) + _fill(rng, rng.choice(_REPORTED if kind == "reported" else _EXPECTED), domain, opposed)


def _noise(rng: random.Random, domain: str) -> list[str]:
    pool = DOMAINS[domain][1] if rng.random() < 0.4 else _NOISE
    return _fill(rng, rng.choice(pool), domain, 0)


def _joint(rng: random.Random) -> list[str]:
    return rng.choice((",", ",", ";", "and", ", and")).split()


def _contrast(rng: random.Random) -> list[str]:
    word = rng.choice(CONTRASTS)
    return [",", word] if rng.random() < 0.5 else [word]


def _other(rng: random.Random, polarity: int) -> int:
    return -polarity if rng.random() < _P_OPPOSED else polarity


def _fill(rng: random.Random, template: str, domain: str, polarity: int) -> list[str]:
    """Replace the slots of a template so that its clause, read alone, has ``polarity``."""
    words: list[str] = []
    for slot in template.split():
        if slot in NEGATION:
            negators, partner = NEGATION[slot]
            if rng.random() < _P_NEGATION:
                words.append(rng.choice(negators))
                polarity = -polarity
            elif partner != "also" or rng.random() < 0.3 or slot == "NOT":
                words.append(partner)
        elif slot in SENTIMENT:
            words.append(rng.choice(SENTIMENT[slot][polarity > 0]))
        elif slot in _ASIDES:
            words += _fill(rng, _ASIDES[slot], domain, rng.choice((-1, 1)))
        elif slot == "NOUN":
            words.append(rng.choice(DOMAINS[domain][0]))
        elif slot in _PHRASES:
            words += rng.choice(_PHRASES[slot]).split()
        else:
            words.append(slot)
    return words
