"""What a sentence of the controlled corpus is like, as columns beside its label: concepts with a known answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from calig.datamodules.controlled import DOMAINS, LABELS
from calig.datamodules.controlled_grammar import CONCESSIONS, CONTRASTS, NEGATION, SENTIMENT
from calig.datamodules.examples import TextExample

COLUMNS: Final = ("label", "sentiment_words", "negation", "contrast", "concession", "intensifier", "domain")
_INTENSIFIERS: Final = ("very", "quite", "really", "rather")
_NEGATORS: Final = frozenset(word for negators, _ in NEGATION.values() for word in negators)
_WORDS: Final = tuple(frozenset(word for pair in SENTIMENT.values() for word in pair[sign]) for sign in (0, 1))
_DOMAIN_OF: Final = {noun: domain for domain, (nouns, _) in DOMAINS.items() for noun in nouns}


def columns_of(example: TextExample) -> dict[str, str]:
    """The value of each of `COLUMNS`: `label` and `domain` by name, `sentiment_words` positive, negative or both, the
    others `present` or `absent`. By the words alone: a title or a clause that does not count has them, too.
    """
    words = example.text if isinstance(example.text, list) else example.text.split()
    negative, positive = (not kind.isdisjoint(words) for kind in _WORDS)
    domains = Counter(_DOMAIN_OF[word] for word in words if word in _DOMAIN_OF).most_common(1)
    return {
        "label": LABELS[example.label] if isinstance(example.label, int) else "",
        "sentiment_words": "both" if negative and positive else LABELS[positive],
        "negation": _told(words, _NEGATORS),
        "contrast": _told(words, CONTRASTS),
        "concession": _told(words, CONCESSIONS),
        "intensifier": _told(words, _INTENSIFIERS),
        "domain": domains[0][0] if domains else "",
    }


def _told(words: Sequence[str], of: Sequence[str] | frozenset[str]) -> str:
    return "absent" if set(of).isdisjoint(words) else "present"
