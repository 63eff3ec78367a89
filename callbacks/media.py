"""Pictures, pages, tables and charts to whichever loggers a Trainer has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from calig.callbacks.image_media import Masked, image_rows_media
from calig.pipeline.loading import rationale_by_word
from calig.pipeline.perturbation import KEPT, REMOVED, Curves
from calig.pipeline.render.decisions import Decision
from calig.pipeline.render.figures import figure_image, layer_heatmap, layer_profile
from calig.pipeline.render.lines import lines_figure
from calig.pipeline.render.tokens import plain_markdown, token_html, token_markdown

_COLUMNS = ("epoch", "sample_id", "text", "label", "prediction", "probability", "completeness_gap")
_MAX_LINES = 8

Table = tuple[Sequence[str], Sequence[Sequence[Any]]]


class Chart(NamedTuple):
    """Lines over one x axis: name -> (x, y) points."""

    title: str
    x_name: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


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
        texts: Mapping[str, str] | None = None,
        images: Mapping[str, Image.Image] | None = None,
        tables: Mapping[str, Table] | None = None,
        charts: Mapping[str, Chart] | None = None,
    ) -> None:
        """Log media under their keys.

        Args:
            step: The Trainer's global step; W&B takes it as the metric `trainer/global_step`, never as its own step.
            html: Key -> fragment, already escaped, for W&B.
            texts: Key -> Markdown, already escaped, for TensorBoard, which would strip the colours off HTML.
            images: Key -> image.
            tables: Key -> columns and rows; a cell may be an image, or an `Html` string. W&B alone shows them.
            charts: Key -> lines: line series in W&B, a picture in TensorBoard.
        """
        for logger in list(self.loggers):
            try:
                kind = logger_kind(logger)
                if kind == "wandb":
                    self._to_wandb(logger, step, html or {}, images or {}, tables or {}, charts or {})
                elif kind == "tensorboard":
                    self._to_tensorboard(logger, step, texts or {}, images or {}, charts or {})
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
        tables: Mapping[str, Table],
        charts: Mapping[str, Chart],
    ) -> None:
        import wandb

        def cell(value: Any) -> Any:
            if isinstance(value, Masked):
                return wandb.Image(value.picture, masks={"object": _wandb_mask(value.mask)})
            if isinstance(value, Image.Image):
                return wandb.Image(value)
            return wandb.Html(str(value), inject=False) if isinstance(value, Html) else value

        media: dict[str, Any] = {key: wandb.Html(text, inject=False) for key, text in html.items()}
        media |= {key: wandb.Image(image) for key, image in images.items()}
        for key, (columns, rows) in tables.items():
            # A fresh table per event: logging the same object again does nothing.
            media[key] = wandb.Table(columns=list(columns), data=[[cell(value) for value in row] for row in rows])
        for key, chart in charts.items():
            names = list(chart.lines)
            xs = [[x for x, _ in chart.lines[name]] for name in names]
            ys = [[y for _, y in chart.lines[name]] for name in names]
            media[key] = wandb.plot.line_series(xs=xs, ys=ys, keys=names, title=chart.title, xname=chart.x_name)
        logger.log_metrics(media, step=step)

    @staticmethod
    def _to_tensorboard(
        logger: Any,
        step: int,
        texts: Mapping[str, str],
        images: Mapping[str, Image.Image],
        charts: Mapping[str, Chart],
    ) -> None:
        import torch

        drawn = {
            key: figure_image(lines_figure(chart.lines, chart.title, chart.x_name)) for key, chart in charts.items()
        }
        for key, image in {**images, **drawn}.items():
            pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
            logger.experiment.add_image(key, pixels.view(image.height, image.width, 3), step, dataformats="HWC")
        for key, text in texts.items():
            logger.experiment.add_text(key, text, step)


def probe_media(
    method: str,
    rows: Sequence[Mapping[str, Any]],
    profiles: Mapping[int, Sequence[float]],
    curves: Mapping[tuple[str, str], Curves],
    label_names: Sequence[str],
    epoch: int,
) -> dict[str, Any]:
    """The pictures of a probe, as arguments of `MediaLog.log`.

    Args:
        method: The attribution method.
        rows: Explanations to show, at least one; `metrics` holds those of the sample, by name.
        profiles: Epoch -> share of the relevance per block; empty for methods without layers.
        curves: Of `perturbation_curves`, averaged over the probe.
        label_names: Class names, as far as they are known.
        epoch: For the table.
    """

    def name(index: int | None) -> str | None:
        if index is None:
            return None
        return label_names[index] if 0 <= index < len(label_names) else str(index)

    metrics = sorted({name for row in rows for name in row.get("metrics", {})})
    prefix = f"val/explain/{method}"
    if rows[0].get("grid") is not None:
        pictures, samples = image_rows_media(rows, metrics, epoch, name)
        found = {f"{prefix}/{key}": image for key, image in pictures.items()}
        shown = {"images": found, "tables": {f"{prefix}/samples": samples}, "charts": {}}
        return _with_charts(shown, prefix, method, profiles, curves, "patches")
    table: list[list[Any]] = []
    paragraphs = []
    for row in rows:
        decision = Decision.of(row)
        title = f"#{row['sample_id']} · " + " · ".join(decision.parts(label_names))
        if decision.plain:
            title = f"#{row['sample_id']} · {name(row['target'])} p={row['probability']:.2f}"
            title += "" if row["label"] is None else f" · label {name(row['label'])}"
        words: dict[str, Any] = {"word_ids": row["word_ids"], "segment": row.get("segment")}
        plain = token_markdown(row["tokens"], row["scores"], **words)
        paragraphs.append(f"{plain_markdown(title)}\n\n{plain}")
        marks = rationale_by_word(row)
        text = token_html(row["tokens"], row["scores"], rationale=marks, title=title, **words)
        heatmap = layer_heatmap(row["tokens"], row["layer_scores"]) if row["layer_scores"] is not None else None
        facts = [*_told(row, name), row["completeness_gap"]]
        values = [row.get("metrics", {}).get(key) for key in metrics]
        table.append([epoch, row["sample_id"], Html(text), *facts, *values, heatmap])
    media: dict[str, Any] = {
        "html": {f"{prefix}/tokens": "\n".join(line[2] for line in table)},
        "texts": {f"{prefix}/tokens": "\n\n---\n\n".join(paragraphs)},
        "images": {} if table[0][-1] is None else {f"{prefix}/layers": table[0][-1]},
        "tables": {f"{prefix}/samples": ((*_COLUMNS, *metrics, "layers"), table)},
        "charts": {},
    }
    return _with_charts(media, prefix, method, profiles, curves)


def _with_charts(
    media: dict[str, Any],
    prefix: str,
    method: str,
    profiles: Mapping[int, Sequence[float]],
    curves: Mapping[tuple[str, str], Curves],
    unit: str = "words",
) -> dict[str, Any]:
    """Add what texts and images have in common: perturbation curves and the layer profile."""
    media["charts"] |= {f"{prefix}/{key}": chart for key, chart in perturbation_charts(curves, [method], unit).items()}
    if profiles:
        media["images"][f"{prefix}/layer_profile_image"] = layer_profile(list(profiles[max(profiles)]))
        media["charts"][f"{prefix}/layer_profile_chart"] = profile_chart(profiles)
    return media


def _told(row: Mapping[str, Any], name: Callable[[int | None], str | None]) -> list[Any]:
    """Label, prediction and probability of a row, a cell each: the name of a class, names of labels, or numbers."""
    if row.get("value") is not None:
        return [row["label_value"], row["value"], None]
    if row.get("predictions") is None:
        return [name(row["label"]), name(row["prediction"]), row["probability"]]
    given, found = ([name(index) for index in some or ()] for some in (row.get("labels"), row["predictions"]))
    return [", ".join(map(str, given)), f"{name(row['target'])} of {', '.join(map(str, found))}", row["probability"]]


def profile_chart(profiles: Mapping[int, Sequence[float]]) -> Chart:
    """The layer profile, a line per probe; of many probes, evenly spread ones from the first to the last."""
    epochs = sorted(profiles)
    if len(epochs) > _MAX_LINES:
        epochs = [epochs[round(i * (len(epochs) - 1) / (_MAX_LINES - 1))] for i in range(_MAX_LINES)]
    lines = {f"epoch {epoch}": [(float(i), y) for i, y in enumerate(profiles[epoch], start=1)] for epoch in epochs}
    return Chart("Share of |relevance| by block", "block", lines)


def perturbation_charts(
    curves: Mapping[tuple[str, str], Curves], methods: Sequence[str], unit: str = "words"
) -> dict[str, Chart]:
    """`perturbation_removed` and `perturbation_kept`: the methods and, beside them, the controls of the first one."""
    wanted = {name: (name, "none") for name in methods if name != "random"}
    wanted |= {"random": ("random", "random"), f"{methods[0]} reversed": (methods[0], "reversed")}
    charts = {}
    for kind, title in ((REMOVED, f"most relevant {unit} removed"), (KEPT, f"only the most relevant {unit} kept")):
        lines = {name: curves[key][kind] for name, key in wanted.items() if kind in curves.get(key, {})}
        if lines:
            charts[f"perturbation_{kind}"] = Chart(f"Probability, {title}", f"share of the {unit}", lines)
    return charts


def _wandb_mask(mask: Image.Image) -> dict[str, Any]:
    """A mask as W&B takes it: an array with 1 on the object."""
    import torch

    pixels = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(mask.height, mask.width)
    return {"mask_data": (pixels > 0).byte().numpy(), "class_labels": {1: "object"}}


class Html(str):
    """A table cell that is HTML, not text."""

    __slots__ = ()
