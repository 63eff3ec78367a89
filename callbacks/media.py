"""Pictures and pages to whichever loggers a Trainer has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from calig.pipeline.loading import rationale_by_word
from calig.pipeline.render.figures import layer_heatmap, layer_profile
from calig.pipeline.render.tokens import token_html

_COLUMNS = ("epoch", "sample_id", "text", "label", "prediction", "probability", "completeness_gap", "layers")


def logger_kind(logger: Any) -> str:
    """Tell `wandb`, `tensorboard` and `other` apart, by the class name along the ancestors.

    `lightning` and `pytorch_lightning` have a class each of the same name.
    """
    names = {cls.__name__ for cls in type(logger).__mro__}
    if "WandbLogger" in names:
        return "wandb"
    return "tensorboard" if "TensorBoardLogger" in names else "other"


class MediaLog:
    """Writes HTML, images and tables to the loggers that can show them; scalars go through `Trainer` as ever.

    A logger that fails is named once and left alone for the rest of the run: it never ends a training.

    Args:
        loggers: The Trainer's loggers.
    """

    def __init__(self, loggers: Sequence[Any]) -> None:
        self.loggers = list(loggers)

    @property
    def shows(self) -> bool:
        """Whether any logger can show media."""
        return any(logger_kind(logger) != "other" for logger in self.loggers)

    def log(
        self,
        step: int,
        *,
        html: Mapping[str, str] | None = None,
        images: Mapping[str, Image.Image] | None = None,
        tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] | None = None,
    ) -> None:
        """Log media under their keys.

        Args:
            step: The Trainer's global step; W&B takes it as the metric `trainer/global_step`, never as its own step.
            html: Key -> fragment, already escaped.
            images: Key -> image.
            tables: Key -> columns and rows; a cell may be an image, or an `Html` string.
        """
        for logger in list(self.loggers):
            try:
                kind = logger_kind(logger)
                if kind == "wandb":
                    self._to_wandb(logger, step, html or {}, images or {}, tables or {})
                elif kind == "tensorboard":
                    self._to_tensorboard(logger, step, html or {}, images or {})
            except Exception as error:
                self.loggers.remove(logger)
                rank_zero_warn(
                    f"{type(logger).__name__} failed and gets no more explanations in this run: "
                    f"{type(error).__name__}: {error}"
                )

    @staticmethod
    def _to_wandb(
        logger: Any,
        step: int,
        html: Mapping[str, str],
        images: Mapping[str, Image.Image],
        tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]],
    ) -> None:
        import wandb

        def cell(value: Any) -> Any:
            if isinstance(value, Image.Image):
                return wandb.Image(value)
            return wandb.Html(str(value), inject=False) if isinstance(value, Html) else value

        media: dict[str, Any] = {key: wandb.Html(text, inject=False) for key, text in html.items()}
        media |= {key: wandb.Image(image) for key, image in images.items()}
        for key, (columns, rows) in tables.items():
            # A fresh table per event: logging the same object again does nothing.
            media[key] = wandb.Table(columns=list(columns), data=[[cell(value) for value in row] for row in rows])
        logger.log_metrics(media, step=step)

    @staticmethod
    def _to_tensorboard(logger: Any, step: int, html: Mapping[str, str], images: Mapping[str, Image.Image]) -> None:
        import torch

        for key, image in images.items():
            pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
            logger.experiment.add_image(key, pixels.view(image.height, image.width, 3), step, dataformats="HWC")
        for key, text in html.items():
            logger.experiment.add_text(key, text, step)


def probe_media(
    method: str, rows: Sequence[Mapping[str, Any]], profile: Sequence[float], label_names: Sequence[str], epoch: int
) -> dict[str, Any]:
    """The pictures of a probe, as arguments of `MediaLog.log`.

    Args:
        method: The attribution method.
        rows: Explanations to show, at least one.
        profile: Share of the relevance per block, or empty.
        label_names: Class names, as far as they are known.
        epoch: For the table.
    """

    def name(index: int | None) -> str | None:
        if index is None:
            return None
        return label_names[index] if 0 <= index < len(label_names) else str(index)

    table: list[list[Any]] = []
    for row in rows:
        title = f"#{row['sample_id']} · {name(row['target'])} p={row['probability']:.2f}"
        if row["label"] is not None:
            title += f" · label {name(row['label'])}"
        marks = rationale_by_word(row)
        text = token_html(row["tokens"], row["scores"], rationale=marks, title=title, word_ids=row["word_ids"])
        heatmap = layer_heatmap(row["tokens"], row["layer_scores"]) if row["layer_scores"] is not None else None
        facts = [name(row["label"]), name(row["prediction"]), row["probability"], row["completeness_gap"]]
        table.append([epoch, row["sample_id"], Html(text), *facts, heatmap])
    prefix = f"val/explain/{method}"
    images = {} if table[0][-1] is None else {f"{prefix}/layers": table[0][-1]}
    if profile:
        images[f"{prefix}/layer_profile_image"] = layer_profile(list(profile))
    return {
        "html": {f"{prefix}/tokens": "\n".join(line[2] for line in table)},
        "images": images,
        "tables": {f"{prefix}/samples": (_COLUMNS, table)},
    }


class Html(str):
    """A table cell that is HTML, not text."""

    __slots__ = ()
