"""The raw example that every text source yields and that one tokenising path takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextExample:
    """One text before tokenisation.

    Attributes:
        sample_id: Row index in its split; stable for the same source and settings.
        text: A string, or a list of words where the source is already split into tokens.
        label: Class index; of several labels 1.0 or 0.0 for each of them; of a regression the number. None where the
            data carries no labels.
        text_pair: The second sentence of a pair, in the form of ``text``.
        rationale: 1 on the words that a human (or the grammar) marked as evidence, 0 elsewhere; one entry per
            word of ``text``, which is then a list of words. None where no rationale is known.
        spans: The rationale of a ``text`` that is a string: [start, end) of characters, in order and apart.
    """

    sample_id: int
    text: str | list[str]
    label: int | float | list[float] | None
    text_pair: str | list[str] | None = None
    rationale: list[int] | None = None
    spans: list[tuple[int, int]] | None = None

    @property
    def content(self) -> str:
        """What makes two examples equal: their words, whatever the white space between them."""
        texts = [text if isinstance(text, str) else " ".join(text) for text in (self.text, self.text_pair or "")]
        return "\n".join(" ".join(text.split()) for text in texts)
