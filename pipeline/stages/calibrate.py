"""calibrate: choose what `explain.options` leaves open (`lam: auto`) on samples that are not explained later."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from calig.callbacks.collectives import end_if_asked, gather
from calig.pipeline.calibrating import Calibration, CalibrationSettings, Calibrator, Point
from calig.pipeline.calibration import read_calibration
from calig.pipeline.config import CALIBRATION_FILE, asked_options, without_asked
from calig.pipeline.records import write_json
from calig.pipeline.run import RunContext

SHOWN = 12


def run_stage(context: RunContext) -> None:
    """Attribute the calibration samples once, search, and keep the choice in `calibration.json`.

    Every process attributes and measures its share of the samples.
    """
    from calig.datamodules.remaining import RemainingSamples

    config, data, module = context.config, context.data, context.module
    chosen = config.calibrate
    ((method, asked),) = asked_options(config.explain.options).items()
    options = context.method_options([method], without_asked(config.explain.options))[method]
    settings = CalibrationSettings(
        options,
        asked,
        objective=chosen.objective,
        operator=chosen.operator,
        grid=chosen.grid,
        target=config.explain.target,
        seed=config.seed,
    )
    calibrator = Calibrator(module.model, context.reader, settings)
    facts = {
        "method": method,
        "asked": asked,
        "options": without_asked(config.explain.options)[method],
        "objective": chosen.objective,
        "operator": None if chosen.objective in ("token_f1", "auprc") else chosen.operator,
        "split": chosen.split,
        "seed": config.seed,
    }
    search = _Search(context, calibrator, facts)
    loader = partial(data.explain_dataloader, chosen.split, chosen.num_samples, config.explain.batch_size, config.seed)

    def share(done: Collection[int], rank: int, world_size: int) -> Any:
        own: Any = loader(done, rank, world_size)
        # A process without a batch would not come to the search: few samples are everyone's, and count once.
        return own if len(own.dataset) >= world_size else loader(done)

    trainer = context.trainer
    trainer.callbacks.append(search)  # type: ignore[attr-defined]
    try:
        samples = RemainingSamples(set, share, context.signals)
        trainer.predict(module, datamodule=samples, return_predictions=False)
    finally:
        trainer.callbacks.remove(search)  # type: ignore[attr-defined]
    trainer.strategy.barrier("calibrated")
    context.log(scalars(read_calibration(context.directory.path) or {}))


class _Search(Callback):
    """Collects the samples of this process while they are predicted, and searches together with the others."""

    def __init__(self, context: RunContext, calibrator: Calibrator, facts: Mapping[str, Any]) -> None:
        self.context, self.calibrator, self.facts = context, calibrator, facts

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Attribute the batch."""
        self.calibrator.add(batch)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search: every process has the same means, and so makes the same choices."""
        found = self.calibrator.choose(self._gather)
        if trainer.is_global_zero:
            self.finish(found)

    def _gather(self, values: Sequence[Any]) -> list[Any]:
        end_if_asked(self.context.signals)  # the search is long, and all processes are here
        return gather(values)

    def finish(self, found: Calibration) -> None:
        """Write and show; here, because a strategy that forks keeps no memory of it."""
        rows = [point.row() for point in found.points]
        best = found.best.row()
        write_json(
            self.context.directory / CALIBRATION_FILE,
            {
                **self.facts,
                # `gated` has no lam, whatever was asked.
                "chosen": {name: best[name] for name in self.facts["asked"] if name in best},
                "num_samples": found.count,
                "skipped": found.skipped,
                "evaluated": found.evaluated,
                **{name: best[name] for name in ("score", "gain", "gain/low", "gain/high")},
                "points": rows,
            },
        )
        show(self.context, found, self.facts)


def scalars(calibration: Mapping[str, Any]) -> dict[str, float]:
    """The scalar keys of the stage: the chosen lambda (one per block behind `/<l>`), its score, its gain."""
    prefix = f"calibrate/{calibration['method']}"
    lam = calibration["chosen"].get("lam")
    values = {f"{prefix}/{name}": calibration[name] for name in ("score", "gain", "gain/low", "gain/high")}
    if isinstance(lam, list):
        values |= {f"{prefix}/lam/{block}": value for block, value in enumerate(lam, start=1)}
    elif lam is not None:
        values[f"{prefix}/lam"] = lam
    return values


def show(context: RunContext, found: Calibration, facts: Mapping[str, Any]) -> None:
    """Print the grid, best first, with the gain over the default."""
    by = facts["objective"] + (f" ({facts['operator']})" if facts["operator"] else "")
    ranked = sorted(found.points, key=lambda point: -point.score)[:SHOWN]
    context.console.table(
        f"calibrate  {found.count} samples of the {facts['split']} split · {by} · gain over the default, 95 % interval",
        ["fusion", "lam", "score", "gain", ""],
        [_cells(point, point is found.best) for point in ranked],
        f"{found.evaluated} candidates tried" + (f", {found.skipped} samples left out" if found.skipped else ""),
    )


def _cells(point: Point, chosen: bool) -> list[str]:
    lam = point.candidate.lam
    spelled = "-" if lam is None else " ".join(f"{value:g}" for value in (lam if isinstance(lam, tuple) else (lam,)))
    gain = f"{point.gain:+.3f}  {point.low:+.3f}–{point.high:+.3f}"
    return [point.candidate.fusion, spelled, f"{point.score:.3f}", gain, "chosen" if chosen else ""]
