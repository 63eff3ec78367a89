"""`explain`: texts or images in, explanations out, from whatever a user has of a model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calig.pipeline.attribution.methods import create_method
from calig.pipeline.errors import InputError, unknown
from calig.pipeline.explanation import Explanation
from calig.pipeline.image_opening import explain_pictures, takes_pictures
from calig.pipeline.image_rows import with_pictures
from calig.pipeline.opening import Opened, open_source
from calig.pipeline.perturbation import CURVE_METRICS, perturbation_curves
from calig.pipeline.records import explained_key

if TYPE_CHECKING:
    from torch import nn

    from calig.pipeline.explained import Explained
    from calig.pipeline.explainer import ExplainSettings

Text = str | list[str]


def explain(
    source: str | Path | nn.Module,
    texts: Sequence[Any],
    *,
    method: str = "ca_lig",
    target: str | int = "predicted",
    batch_size: int = 16,
    text_pairs: Sequence[str] | None = None,
    tokenizer: Any = None,
    curves: bool = False,
    **options: Any,
) -> list[Explanation]:
    """Explain what a classifier decides about texts, or about images.

    A text that is too long is cut, with a warning that says how much was lost; a model that was trained on overlapping
    windows (`data.windows`) reads it in windows, and the explanation is of the whole text.

    Args:
        source: A run directory, a Hugging Face folder, a Lightning checkpoint of a calig run, or a live model.
        texts: The texts; for a model of images their paths, or PIL images.
        method: One of `available_methods()`.
        target: The class (or label) to explain: "predicted", its name, or its index.
        batch_size: Texts at a time; changes the speed only.
        text_pairs: The second text of each, for a model of pairs.
        tokenizer: Needed with a live model; for a model of images its image processor.
        curves: Measure perturbation curves and their controls too, for `Explanation.plot_curves`: some 30 forward
            passes more per text. Words are masked where the tokenizer has a token for it, else hidden from attention.
        **options: Options of the method, for example `steps=32` or `fusion="late"`. Those not given are what the run
            explained with; for what is not of a run, the method's defaults with `steps="auto"`.

    Returns:
        One explanation per text, in their order; of a model of several labels one for each label that is predicted (the
        most probable one where none is), one after the other.

    Raises:
        InputError: No or an empty text, an image that cannot be read, an unknown method, option or target, a source
            that cannot be opened.
        SampleFailure: A text could not be explained; the message names it.

    Example::

        for explanation in explain("runs/quickstart", ["the plot was not bad"]):
            print(explanation)          # or let a notebook show it
            explanation.plot_layers()
    """
    if not takes_pictures(source):
        check_texts(texts, text_pairs)
    elif text_pairs is not None:
        raise InputError("text_pairs belong to a model of texts; this one takes images.")
    create_method(method, options)  # before anything slow
    if batch_size < 1:
        raise InputError(f"batch_size takes 1 or more, got {batch_size}.")
    opened = open_source(source, tokenizer)
    settings = settings_of(opened, method, target, options)
    if curves:
        settings = dataclasses.replace(settings, operators=(curve_operator(opened),), metrics=tuple(CURVE_METRICS))
    rows = []
    for explained in explain_batches(opened, texts, text_pairs, settings, batch_size):
        if explained.failures:
            from calig.pipeline.explained import SampleFailure

            first = explained.failures[0]
            kind = "image" if opened.images else "text"
            raise SampleFailure(f"{kind} {first['sample_id']} was not explained by '{method}': {first['reason']}")
        explained.explanations = with_pictures(explained.explanations, explained.files)
        rows += explained.explanations if not curves else list(_with_curves(explained))
    rows.sort(key=lambda row: row["sample_id"])
    return [Explanation.from_row(row, opened.label_names, opened.segments) for row in rows]


def curve_operator(opened: Opened) -> str:
    """How perturbation curves remove words or patches: see `default_operator`."""
    from calig.pipeline.perturbers import default_operator

    return default_operator(opened.model, opened.tokenizer)


def _with_curves(explained: Explained) -> Iterator[dict[str, Any]]:
    for row in explained.explanations:
        found = perturbation_curves(explained.metrics, {explained_key(row): row["probability"]})
        yield {**row, "curves": {control: curves for (_, control), curves in found.items()}}


def check_texts(texts: Sequence[Text], text_pairs: Sequence[Text] | None) -> None:
    """Refuse what no model can read: no text, one that is empty or not a string, pairs that do not pair.

    Raises:
        InputError: Names the first text that is wrong.
    """
    for name, values in (("texts", texts), ("text_pairs", text_pairs)):
        if values is None:
            continue
        if isinstance(values, str):
            raise InputError(f"{name} takes a list of strings, got one string; write [{values[:40]!r}].")
        if not len(values):
            raise InputError(f"{name} is empty: give at least one text.")
        for index, text in enumerate(values):
            if not isinstance(text, (str, list)):
                raise InputError(f"{name}[{index}] is {type(text).__name__}; expected a string.")
            plain = text if isinstance(text, str) else " ".join(text)
            if not plain.strip():
                raise InputError(f"{name}[{index}] is empty: there is nothing to explain.")
            try:
                plain.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"{name}[{index}] is not valid Unicode: {error.reason}.") from error
    if text_pairs is not None and len(text_pairs) != len(texts):
        raise InputError(f"{len(texts)} texts and {len(text_pairs)} second texts: give one second text per text.")


def settings_of(opened: Opened, method: str, target: str | int, options: Mapping[str, Any]) -> ExplainSettings:
    """Merge the options of the call with those of the run, and resolve the target's name.

    Raises:
        InputError: An unknown method, option or target.
    """
    from calig.pipeline.explainer import ExplainSettings, settings_for

    own = {**opened.options.get(method, {}), **options}
    chosen = settings_for([method], {method: own}, {"steps": "auto"})
    # No operators: nothing is perturbed, these are explanations without metrics.
    return ExplainSettings(chosen, target=_target(target, opened.label_names), operators=(), plausibility=False)


def explain_batches(
    opened: Opened,
    texts: Sequence[Any],
    text_pairs: Sequence[Text] | None,
    settings: ExplainSettings,
    batch_size: int,
) -> Iterator[Explained]:
    """Explain in batches, the longest texts first; everything is tokenised, and so checked, before the first one.

    Yields:
        The rows of a batch; `sample_id` is the position in `texts`.
    """
    from calig.datamodules.collate import TextCollator
    from calig.datamodules.examples import TextExample
    from calig.datamodules.tokenization import encode_all
    from calig.pipeline.attribution import UnsupportedModelError
    from calig.pipeline.explainer import Explainer

    if opened.images:
        yield from explain_pictures(opened, texts, settings, batch_size)
        return
    tokenizer = opened.tokenizer
    pairs = text_pairs if text_pairs is not None else [None] * len(texts)
    examples = [TextExample(i, text, None, pair) for i, (text, pair) in enumerate(zip(texts, pairs, strict=True))]
    encoded = list(encode_all(examples, tokenizer, opened.max_length, opened.windows))
    _warn_of_truncation(opened, examples, encoded)
    try:
        explainer = Explainer(opened.model, tokenizer, settings)
    except UnsupportedModelError as error:  # here the model is what a user gave
        raise InputError(str(error)) from error
    names = tuple(tokenizer.model_input_names)
    collate = TextCollator(tokenizer.pad_token_id, "right", names, tokenizer.pad_token_type_id)
    encoded.sort(key=lambda row: -len(row["input_ids"]))
    for start in range(0, len(encoded), batch_size):
        batch = collate(encoded[start : start + batch_size])
        yield explainer.explain({key: value.to(explainer.model.device) for key, value in batch.items()})


def _warn_of_truncation(opened: Opened, examples: Sequence[Any], encoded: Sequence[Mapping[str, Any]]) -> None:
    cut = [example for example, row in zip(examples, encoded, strict=True) if row["truncated"]]
    if not cut:
        return
    lost = []
    for example in cut[:3]:
        plain = [
            text if isinstance(text, str) else " ".join(text) for text in (example.text, example.text_pair) if text
        ]
        total = len(opened.tokenizer(*plain, truncation=False, verbose=False)["input_ids"])
        kept = total - encoded[example.sample_id]["tokens_cut"]
        lost.append(f"text {example.sample_id} lost {total - kept} of {total}")
    more = f" and {len(cut) - 3} more" if len(cut) > 3 else ""
    count = "1 text was" if len(cut) == 1 else f"{len(cut)} texts were"
    room = f"{opened.max_length} tokens"
    if opened.windows is not None:
        room = f"{opened.windows.limit} windows of {room}"
    warnings.warn(f"{count} cut to the {room} of this model: {', '.join(lost)}{more}", stacklevel=4)


def _target(target: str | int, label_names: Sequence[str]) -> Any:
    if target == "predicted":
        return target
    if target == "label":
        raise InputError("target='label' needs labels, which texts do not have; give 'predicted' or a class.")
    if isinstance(target, str):
        if target in label_names:
            return label_names.index(target)
        if not target.isdecimal():
            raise unknown("target", target, ["predicted", *label_names], "A class can be given by its index, too.")
        target = int(target)
    if isinstance(target, bool) or not isinstance(target, int):
        raise InputError(f"target takes 'predicted', a class name or its index, got {target!r}.")
    if label_names and not 0 <= target < len(label_names):
        raise InputError(f"target {target} is no class; the model has {len(label_names)}: {', '.join(label_names)}.")
    return target
