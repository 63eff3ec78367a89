"""Signed highlighting of a text: as HTML with inline styles, and for the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from rich.text import Text

from calig.pipeline.errors import InputError
from calig.pipeline.render.color import OPPOSES, SUPPORTS, abs_scale, css_tint, hex_color, unit
from calig.pipeline.render.pieces import Word, merge_pieces

_BOX = "background:Canvas;color:CanvasText;font:15px/1.9 system-ui,sans-serif;overflow-wrap:anywhere"
SEGMENTS = ("first", "second")
"""What the texts of a pair are called where their columns are not known."""
_SMALL = "font-size:12px;opacity:.7"
# All ASCII punctuation may mean something to a reader of Markdown or HTML.
_MARKDOWN = re.compile(r"[!-/:-@\[-`{-~]")


def token_html(
    tokens: Sequence[str],
    scores: Sequence[float],
    *,
    rationale: Sequence[int] | None = None,
    title: str | None = None,
    scale: float | None = None,
    word_ids: Sequence[int | None] | None = None,
    legend: bool = False,
    segment: Sequence[int | None] | None = None,
    segment_names: Sequence[str] = SEGMENTS,
) -> str:
    """HTML fragment of a text with signed highlighting; inline styles only, loads nothing, every text escaped.

    Args:
        tokens: (T,) pieces as the tokenizer names them.
        scores: (T,) signed relevance, positive supports the objective.
        rationale: 1 on the words that a human marked, underlined: one entry per word id where ``word_ids`` is given
            (it may be longer than what truncation kept), else one per token.
        title: A line above the text.
        scale: The score of full colour; None takes the largest absolute word score (special tokens left out), which
            is then also the scale that the legend names.
        word_ids: (T,) the word of each piece, None for special tokens; given, the pieces of a word are summed.
        legend: Whether a legend stands below the text.
        segment: (T,) 0 on the first text of a pair and 1 on the second, None on special tokens: shown apart.
        segment_names: What the two are called.
    """
    words = merge_pieces(tokens, scores, word_ids)
    scale = word_scale(words) if scale is None else scale
    parts = [f'<div style="{_BOX}">']
    if title is not None:
        parts.append(f'<div style="font-weight:600">{escape(title)}</div>')
    texts = split_segments(words, segment)
    for name, text in zip(segment_names, texts, strict=False):
        if len(texts) > 1:
            parts.append(f'<div style="{_SMALL}">{escape(name)}</div>')
        parts.append(f'<div dir="auto">{word_spans(text, rationale=rationale, scale=scale)}</div>')
    if legend and any(word.score for word in words if not word.special):
        parts.append(legend_html(scale))
    elif legend:
        parts.append(f'<div style="{_SMALL}" dir="ltr">no word has any relevance</div>')
    return "".join([*parts, "</div>"])


def named_segments(first: str | None, second: str | None) -> tuple[str, str]:
    """What the texts of pairs are called: their columns, where these have names and are no numbers."""
    names = first or SEGMENTS[0], second or SEGMENTS[1]
    return SEGMENTS if any(name.isdecimal() for name in names) else names


def split_segments(words: Sequence[Word], segment: Sequence[int | None] | None) -> list[Sequence[Word]]:
    """The words of each text of a pair, special tokens with the text before them; one part where there is one text."""
    if segment is None:
        return [words]
    start = next((i for i, word in enumerate(words) if segment[word.positions[0]] == 1), None)
    return [words] if start is None else [words[:start], words[start:]]


def word_spans(words: Sequence[Word], *, rationale: Sequence[int] | None = None, scale: float | None = None) -> str:
    """The words alone, as inline ``span`` elements on a transparent ground, for a page with colours of its own."""
    scale = word_scale(words) if scale is None else scale
    return "".join((" " if word.space else "") + _span(word, scale, in_rationale(word, rationale)) for word in words)


def legend_html(scale: float) -> str:
    """One line: the two colours, what they mean, and the score of full colour."""
    bar = ",".join(css_tint(step / 4) for step in range(-4, 5))
    return (
        f'<div style="{_SMALL}" dir="ltr">opposes −{scale:.3g} <span style="display:inline-block;width:8em;height:.8em;'
        f'vertical-align:-.1em;background:linear-gradient(to right,{bar})"></span> +{scale:.3g} supports</div>'
    )


def token_text(
    tokens: Sequence[str],
    scores: Sequence[float],
    *,
    rationale: Sequence[int] | None = None,
    scale: float | None = None,
    word_ids: Sequence[int | None] | None = None,
    legend: bool = False,
    segment: Sequence[int | None] | None = None,
    segment_names: Sequence[str] = SEGMENTS,
) -> Text:
    """The same highlighting for the terminal; arguments as in :func:`token_html`.

    Four steps of emphasis that read on light and on dark grounds. Opposing words are also in italics, so that the
    sign survives where rich drops colours (``NO_COLOR``).
    """
    words = merge_pieces(tokens, scores, word_ids)
    scale = word_scale(words) if scale is None else scale
    text = Text()
    texts = split_segments(words, segment)
    width = max(map(len, segment_names)) if len(texts) > 1 else 0
    for number, part in enumerate(texts):
        if len(texts) > 1:
            text.append(("\n" if number else "") + f"{segment_names[number]:<{width}}  ", style="dim")
        for index, word in enumerate(part):
            if word.space and (index or not number):
                text.append(" ")
            style = "dim" if word.special else terminal_style(unit(word.score, scale))
            text.append(word.text, style=f"{style} underline".strip() if in_rationale(word, rationale) else style)
    if legend:
        text.append("\n")
        text.append(" supports ", style=terminal_style(1.0))
        text.append(" ")
        text.append(" opposes ", style=terminal_style(-1.0))
        text.append(f"  full colour at {scale:.3g}", style="dim")
    return text


def token_markdown(
    tokens: Sequence[str],
    scores: Sequence[float],
    *,
    word_ids: Sequence[int | None] | None = None,
    segment: Sequence[int | None] | None = None,
    segment_names: Sequence[str] = SEGMENTS,
) -> str:
    """A paragraph of Markdown for viewers that drop colours: words above a third of the largest score are marked.

    Supporting words are bold, opposing ones in italics, both with their score; arguments as in :func:`token_html`.
    """
    words = merge_pieces(tokens, scores, word_ids)
    scale = word_scale(words)
    texts = split_segments(words, segment)
    paragraphs = []
    for name, part in zip(segment_names, texts, strict=False):
        text = "" if len(texts) == 1 else f"{plain_markdown(name)}&#58;"
        for word in part:
            shown = plain_markdown(word.text)
            if not word.special and abs(value := unit(word.score, scale)) >= 0.35:
                mark = "**" if value > 0 else "*"
                shown = f"{mark}{shown}{mark} ({word.score:+.2g})"
            text += (" " if word.space or text.endswith("&#58;") else "") + shown
        paragraphs.append(text)
    return "\n\n".join(paragraphs)


def plain_markdown(text: str) -> str:
    """A text that means nothing to a reader of Markdown or HTML."""
    return _MARKDOWN.sub(lambda found: f"&#{ord(found[0])};", text)


def word_scale(words: Sequence[Word]) -> float:
    """The largest absolute score among ordinary words (special tokens would drown them)."""
    return abs_scale(word.score for word in words if not word.special)


def in_rationale(word: Word, rationale: Sequence[int] | None) -> bool:
    """Whether a human marked the word (see ``rationale`` in :func:`token_html`)."""
    if rationale is None or word.special:
        return False
    index = word.positions[0] if word.word_id is None else word.word_id
    if index < 0:
        raise InputError(f"word id {index} of '{word.text}' is negative; special tokens have the word id None.")
    return index < len(rationale) and bool(rationale[index])


def _span(word: Word, scale: float, marked: bool) -> str:
    if word.special:
        style = "font-size:.7em;color:GrayText"
    else:
        style = f"background:{css_tint(unit(word.score, scale))};border-radius:3px;padding:.1em .15em"
        if marked:
            style += ";text-decoration:underline 2px;text-underline-offset:.25em"
    title = f"{word.score:+.4g}" + (" · human rationale" if marked else "")
    direction = ' dir="ltr"' if word.special else ""  # else the Latin "CLS" would make every text run left to right
    return f'<span{direction} style="{style}" title="{escape(title)}">{escape(word.text)}</span>'


def terminal_style(value: float) -> str:
    """The style of a value in [-1, 1] in a terminal: four steps of emphasis, opposing ones in italics."""
    size, opposes = abs(value), value < 0
    if size < 0.1:
        return ""
    sign = "italic " if opposes else ""
    if size >= 0.65:
        return f"{sign}bold white on {hex_color(OPPOSES if opposes else SUPPORTS)}"
    color = "#d9731a" if opposes else "#4a90d9"
    return f"{sign}bold {color}" if size >= 0.35 else f"{sign}{color}"
