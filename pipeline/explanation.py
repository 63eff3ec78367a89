"""`Explanation`: one explained sample, to look at in a notebook, in a terminal, or as a figure."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from calig.pipeline.errors import InputError
from calig.pipeline.loading import rationale_by_word
from calig.pipeline.perturbation import KEPT, REMOVED, Curves
from calig.pipeline.render.color import OPPOSES, SUPPORTS, abs_scale, hex_color
from calig.pipeline.render.decisions import Decision, class_name
from calig.pipeline.render.pieces import Word, join_pieces, merge_pieces
from calig.pipeline.render.tokens import SEGMENTS, token_html, token_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BARS = "▁▂▃▄▅▆▇█"
# A byte-level tokenizer spells every byte of its text, also those that would command a terminal.
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, repr=False)
class Explanation:
    """How much each token of one sample supports or opposes a decision, as one method sees it.

    Attributes:
        tokens: (T,) as the tokenizer spells them, special tokens included.
        scores: (T,) signed relevance; positive supports the target.
        method: The attribution method.
        prediction: The predicted class: the largest output.
        target: The class that is explained; one of several labels; 0 of a regression.
        probability: The model's probability of the target; None of a regression.
        sample_id: Row index in the data; in `explain`, position in `texts`.
        word_ids: (T,) the word of each token, None on special tokens.
        layer_scores: (L, T), blocks 1 to L; None for methods that see one layer only.
        label: The true class, where known.
        rationale: (T,) 1 on tokens that a human marked, where known.
        completeness_gap: Relative, the maximum over layers; None where the method claims no completeness.
        error_bound: The bound on that gap measured from the path itself, where there is one.
        steps_used: Nodes of the path; 1 without a path.
        converged: Whether the bound (else the gap) stayed within the tolerance.
        grid: Rows and columns of an image's patches, whose tokens are then those patches; None for a text.
        picture: PNG of the image, where it is there.
        mask: PNG of its object, white on black, where it is known.
        curves: `none` (the method's own ranking) and the controls `reversed` and `random` -> perturbation curves
            (`calig.pipeline.perturbation`); None where they were not measured.
        label_names: Class names in the order of their indices; without them classes are shown as numbers.
        segment: (T,) 0 on the first text of a pair and 1 on the second, None on special tokens; None of single texts.
        segment_names: What the two texts of a pair are called.
        predictions: The labels that are predicted, where a text may have several.
        labels: The labels that are given, where a text may have several and they are known.
        value: The output of a regression.
        label_value: The true number, where known.
    """

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    method: str
    prediction: int
    target: int
    probability: float | None
    sample_id: int = 0
    word_ids: tuple[int | None, ...] | None = None
    layer_scores: tuple[tuple[float, ...], ...] | None = None
    label: int | None = None
    rationale: tuple[int, ...] | None = None
    completeness_gap: float | None = None
    error_bound: float | None = None
    steps_used: int = 1
    converged: bool = True
    grid: tuple[int, int] | None = None
    picture: bytes | None = None
    mask: bytes | None = None
    curves: Mapping[str, Curves] | None = None
    label_names: tuple[str, ...] = ()
    segment: tuple[int | None, ...] | None = None
    segment_names: tuple[str, ...] = SEGMENTS
    predictions: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None
    value: float | None = None
    label_value: float | None = None

    @classmethod
    def from_row(
        cls,
        row: Mapping[str, Any],
        label_names: Sequence[str] = (),
        segment_names: Sequence[str] = SEGMENTS,
        folder: str | Path | None = None,
    ) -> Explanation:
        """From a row as explanations are kept (`load_explanations`, `calig.pipeline.records`).

        Args:
            row: The row.
            label_names: Class names in the order of their indices.
            segment_names: What the texts of a pair are called.
            folder: The run directory, where the pictures of images are.
        """
        layers = row.get("layer_scores")
        word_ids, rationale = row.get("word_ids"), row.get("rationale")
        names = ("method", "prediction", "target", "probability", "sample_id", "label")
        more = ("completeness_gap", "error_bound", "steps_used", "converged", "curves", "value", "label_value")
        lists: dict[str, Any] = {
            name: tuple(row[name]) for name in ("segment", "predictions", "labels") if row.get(name) is not None
        }
        return cls(
            tokens=tuple(row["tokens"]),
            scores=tuple(row["scores"]),
            word_ids=None if word_ids is None else tuple(word_ids),
            layer_scores=None if layers is None else tuple(tuple(layer) for layer in layers),
            rationale=None if rationale is None else tuple(rationale),
            label_names=tuple(label_names),
            segment_names=tuple(segment_names),
            grid=None if row.get("grid") is None else tuple(row["grid"]),
            picture=_file(row, "picture", "image_ref", folder),
            mask=_file(row, "mask", "mask_ref", folder),
            **lists,
            **{name: row[name] for name in (*names, *more) if name in row},
        )

    @property
    def words(self) -> list[Word]:
        """The pieces joined to words with `text`, summed `score` and `special`, in reading order."""
        return merge_pieces(self.tokens, self.scores, self.word_ids)

    @property
    def text(self) -> str:
        """What the model read, without special tokens; normalised and cut as the tokenizer does it.

        Of an image, its number of patches.
        """
        if self.grid is not None:
            return f"{self.grid[0]} x {self.grid[1]} patches"
        shown = [word for word in self.words if not word.special]
        return "".join((" " if word.space and i else "") + word.text for i, word in enumerate(shown))

    @property
    def prediction_name(self) -> str:
        """Name of the predicted class."""
        return self._name(self.prediction)

    @property
    def target_name(self) -> str:
        """Name of the explained class."""
        return self._name(self.target)

    @property
    def layer_profile(self) -> list[float] | None:
        """(L,) share of the absolute relevance that each block holds (all 0 where there is none)."""
        if self.layer_scores is None:
            return None
        sums = [sum(map(abs, layer)) for layer in self.layer_scores]
        return [value / (sum(sums) or 1.0) for value in sums]

    def top(self, k: int = 5, *, opposing: bool = False) -> list[Word]:
        """Up to k words that support the target most, or oppose it; special tokens and the negligible left out."""
        words = [word for word in self.words if not word.special]
        least = 0.05 * abs_scale(word.score for word in words)
        sign = -1 if opposing else 1
        chosen = [word for word in words if sign * word.score >= least and word.score]
        return sorted(chosen, key=lambda word: -sign * word.score)[:k]

    def summary(self) -> str:
        """One line: the decision, the method, and how far the explanation can be trusted."""
        return " · ".join([*Decision.of(vars(self)).parts(self.label_names), *self._trust()])

    def _trust(self) -> list[str]:
        """The method, and how far its explanation can be trusted."""
        parts = [self.method]
        if self.completeness_gap is not None:
            parts.append(f"completeness gap {self.completeness_gap:.1%}")
        if not self.converged:
            parts.append("not converged")
        return parts

    def patches(self, scores: Sequence[float] | None = None) -> list[float]:
        """The scores of an image's patches, row by row; of the decision unless others are given."""
        scores = self.scores if scores is None else scores
        return [score for score, word in zip(scores, self.word_ids or (), strict=True) if word is not None]

    def plot_layers(self, *, per_layer: bool = False) -> Figure:
        """Heatmap of blocks x tokens, block 1 at the bottom; of an image, the map of every block over the picture.

        Args:
            per_layer: Divide each block's row by its own largest absolute value.

        Raises:
            InputError: The method has no layer scores.
        """
        from calig.pipeline.render.figures import layer_heatmap_figure

        if self.grid is not None:
            from calig.pipeline.render.image import layer_strip_figure

            maps = [self.patches(layer) for layer in self._layers()]
            own, title = self.patches(), self.summary()
            return _shown(
                layer_strip_figure(self.picture, maps, self.grid, own, title, per_layer=per_layer, mask=self.mask)
            )
        labels = [self.tokens[i] for i in range(len(self.tokens))]
        byte_level = any(token.startswith(("Ġ", "Ċ")) for token in labels)
        for word in self.words:
            for i in () if word.special else word.positions:
                labels[i] = join_pieces([labels[i]], byte_level=byte_level)
        return _shown(layer_heatmap_figure(labels, self._layers(), self.summary(), per_layer=per_layer))

    def plot_profile(self) -> Figure:
        """Bars: the share of the absolute relevance that each block holds.

        Raises:
            InputError: The method has no layer scores.
        """
        from calig.pipeline.render.figures import layer_profile_figure

        self._layers()
        return _shown(layer_profile_figure(self.layer_profile or [], self.summary()))

    def plot_flow(self) -> Figure:
        """Lines: how the relevance of each word moves from block 1 to the decision; the strongest words are named.

        Raises:
            InputError: The method has no layer scores.
        """
        from calig.pipeline.render.lines import flow_figure

        words = [word for word in self.words if not word.special]
        rows = [[sum(layer[i] for i in word.positions) for word in words] for layer in self._layers()]
        return _shown(flow_figure([word.text for word in words], rows, self.summary()))

    def plot_curves(self) -> Figure:
        """Perturbation curves beside their controls: the probability as the most relevant words go, or stay alone.

        Raises:
            InputError: The curves were not measured.
        """
        from calig.pipeline.render.lines import curves_figure

        if not self.curves:
            raise InputError(
                "this explanation holds no perturbation curves, which take forward passes of their own; "
                "explain(..., curves=True) measures them."
            )
        names = {"none": self.method, "random": "random", "reversed": "reversed"}
        unit = "words" if self.grid is None else "patches"
        titles = {REMOVED: f"most relevant {unit} removed", KEPT: f"only the most relevant {unit} kept"}
        panels = {
            title: {name: self.curves[key][kind] for key, name in names.items() if kind in self.curves.get(key, {})}
            for kind, title in titles.items()
        }
        return _shown(curves_figure({title: lines for title, lines in panels.items() if lines}, self.summary()))

    def _repr_html_(self) -> str:
        if self.grid is not None:
            from calig.pipeline.render.image import image_html

            names = [word.text for word in self.words if not word.special]
            own, title = self.patches(), self.summary()
            text = image_html(self.picture, own, self.grid, names=names, title=title, mask=self.mask, legend=True)
        else:
            text = token_html(
                self.tokens,
                self.scores,
                word_ids=self.word_ids,
                rationale=self._word_rationale(),
                title=self.summary(),
                legend=True,
                segment=self.segment,
                segment_names=self.segment_names,
            )
        profile = self.layer_profile
        return text if not profile else f"<div>{text}{_profile_html(profile)}</div>"

    def __rich__(self) -> Group:
        if self.grid is not None:
            from calig.pipeline.render.image import grid_text

            tokens = grid_text(self.patches(), self.grid)
        else:
            tokens = token_text(
                self.tokens,
                self.scores,
                word_ids=self.word_ids,
                rationale=self._word_rationale(),
                segment=self.segment,
                segment_names=self.segment_names,
            )
        lines = [Text(self.summary(), style="bold"), tokens, *self._numbers()]
        for line in lines:
            line.plain = _CONTROL.sub("�", line.plain)  # of the same length, so the styles stay where they are
        return Group(*lines)

    def __str__(self) -> str:
        return "\n".join(line.plain for line in self.__rich__().renderables if isinstance(line, Text))

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else f"{self.text[:59]}…"
        return f"Explanation({self.sample_id}, {self.summary()!r}, {text!r})"

    def _numbers(self) -> list[Text]:
        """The strongest words with their scores, and the profile: what is left to read without any colour."""
        lines = []
        form = "+.2f" if abs_scale(word.score for word in self.words if not word.special) >= 0.1 else "+.2g"
        for name, color, opposing in (("supports", SUPPORTS, False), ("opposes", OPPOSES, True)):
            if words := self.top(opposing=opposing):
                badge = (name, f"bold white on {hex_color(color)}")
                listed = "  ".join(f"{word.text} {word.score:{form}}" for word in words)
                lines.append(Text.assemble(badge, " " * (10 - len(name)), listed))
        if profile := self.layer_profile:
            largest = max(profile) or 1.0
            bars = "".join(_BARS[min(7, int(8 * share / largest))] for share in profile)
            shares = " ".join(f"{100 * share:.0f}" for share in profile)
            lines.append(Text.assemble(("layers    ", "dim"), bars, (f"  {shares} %", "dim")))
        return lines

    def _layers(self) -> tuple[tuple[float, ...], ...]:
        if self.layer_scores is None:
            raise InputError(
                f"'{self.method}' has no layer scores to plot; methods that look into the layers are "
                "ca_lig, generic_attention and attention_rollout."
            )
        return self.layer_scores

    def _name(self, index: int) -> str:
        return class_name(index, self.label_names)

    def _word_rationale(self) -> list[int] | None:
        if self.rationale is None or self.word_ids is None:
            return None
        return rationale_by_word({"rationale": self.rationale, "word_ids": self.word_ids})


def _file(row: Mapping[str, Any], key: str, ref: str, folder: str | Path | None) -> bytes | None:
    """The content of a file that a row refers to: in the row itself, or where it lies in a run directory."""
    if row.get(key) is not None or folder is None or row.get(ref) is None:
        return row.get(key)
    path = Path(folder) / row[ref]
    return path.read_bytes() if path.is_file() else None


def _profile_html(profile: Sequence[float]) -> str:
    largest = max(profile) or 1.0
    bars = "".join(
        f'<span title="block {i}: {share:.1%}" style="display:inline-block;width:.6em;margin-right:1px;'
        f'height:{max(0.06, 1.6 * share / largest):.2f}em;background:currentColor;opacity:.55"></span>'
        for i, share in enumerate(profile, start=1)
    )
    peak = max(range(len(profile)), key=profile.__getitem__)
    words = escape(f"blocks 1 to {len(profile)}, most in block {peak + 1} ({profile[peak]:.0%})")
    style = "background:Canvas;color:CanvasText;font:12px/1.6 system-ui,sans-serif"
    return f'<div style="{style}">{bars} <span style="opacity:.7">{words}</span></div>'


def _shown(figure: Figure) -> Figure:
    """Let a notebook show the figure also where pyplot, which would do so, was never imported."""
    figure._repr_png_ = functools.partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def _png(figure: Figure) -> bytes:
    from calig.pipeline.render.figures import figure_image

    buffer = io.BytesIO()
    figure_image(figure).save(buffer, "PNG")
    return buffer.getvalue()
