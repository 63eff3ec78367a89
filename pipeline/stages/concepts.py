"""concepts: which human concepts move the output of a class, and at which layers (METHODS 4.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from calig.callbacks.collectives import gather
from calig.callbacks.media import MediaLog
from calig.datamodules.concept_sets import ConceptSets
from calig.pipeline.attribution import ClassLogit, ExplainableModel, UnsupportedModelError
from calig.pipeline.attribution.concepts import pooled_states, weighted_gradients
from calig.pipeline.concept_rows import CONCEPTS_FILE, LEVEL, ConceptRow, write_concepts
from calig.pipeline.concept_testing import chosen_layers, concept_rows
from calig.pipeline.errors import InputError
from calig.pipeline.render.figures import concept_map
from calig.pipeline.run import RunContext

_SHOWN_LAYERS = 13


def check(context: RunContext) -> None:
    """What can be known before the training: concepts that can be read, a model and layers that will do.

    Raises:
        InputError: Names the key and the way out.
    """
    config, module = context.config.concepts, context.module
    context.data.dataset(config.split)
    _ = context.concept_sets
    classes = len(module.label_names)
    if getattr(module.model.config, "num_labels", classes) < 2:
        raise InputError(
            "the stage concepts asks which class concepts move, and this model has one output (a regression). Leave "
            "concepts out of stages."
        )
    if isinstance(config.target, int) and config.target >= classes:
        raise InputError(f"concepts.target={config.target} names no class: the model has {classes}, from 0.")
    depth = getattr(module.model.config, "num_hidden_layers", None)
    if depth is not None:
        chosen_layers(config.layers, depth)
    if config.weights != "mean":
        try:
            ExplainableModel(module.model, tokenizer=context.data.tokenizer).require_interface()
        except UnsupportedModelError as error:
            raise InputError(
                f"concepts.weights={config.weights} needs attention maps: {str(error).split('. ')[0]}. Set "
                "concepts.weights=mean, plain TCAV."
            ) from error


def run_stage(context: RunContext) -> None:
    """Run the inputs and the sets once, fit, test, and write `concepts.csv`."""
    config, data, module = context.config.concepts, context.data, context.module
    size = context.config.explain.batch_size
    sets = context.concept_sets
    loaders = [
        data.explain_dataloader(config.split, config.num_samples, size, context.config.seed),
        data.rows_dataloader(sets.rows, size),
    ]
    passes = _Passes(context, sets)
    trainer = context.trainer
    if min(len(loader.dataset) for loader in loaders) >= trainer.world_size:  # type: ignore[arg-type]
        trainer.callbacks.append(passes)  # type: ignore[attr-defined]
        try:
            trainer.predict(module, dataloaders=loaders, return_predictions=False)
        finally:
            trainer.callbacks.remove(passes)  # type: ignore[attr-defined]
    else:  # Lightning's exact sampler wants a sample per process
        context.alone(lambda: passes.run(loaders))
    trainer.strategy.barrier("concepts tested")


class _Input(NamedTuple):
    """An analysed input: its id, predicted class, and attention-weighted gradients (L, D) of that class's logit."""

    sample_id: int
    predicted: int
    gradient: Tensor


class _Passes(Callback):
    """Collects what the inputs (the first loader) and the sets (the second) give while they are predicted."""

    def __init__(self, context: RunContext, sets: ConceptSets) -> None:
        self.context, self.sets = context, sets
        self.model: ExplainableModel | None = None
        self.inputs: list[_Input] = []
        self.states: list[tuple[int, Tensor]] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Run the batch."""
        self.add(batch, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test, on one process."""
        inputs, states = gather(self.inputs), gather(self.states)
        if trainer.is_global_zero:
            self.finish(inputs, states)

    def run(self, loaders: Sequence[Iterable[Mapping[str, Any]]]) -> None:
        """Run everything on this process."""
        for index, loader in enumerate(loaders):
            for batch in loader:
                self.add(batch, index)
        self.finish(self.inputs, self.states)

    def add(self, batch: Mapping[str, Any], loader: int) -> None:
        """Run a batch of inputs (loader 0) or of the sets (1)."""
        if self.model is None:  # not before the Trainer has put the weights where they run
            self.model = ExplainableModel(self.context.module.model, tokenizer=self.context.data.tokenizer)
        ids = batch["sample_id"].tolist()
        with self.model.session():
            inputs = self.model.prepare(batch, batch.get("special_tokens_mask"))
            if loader == 1:
                self.states += zip(ids, pooled_states(self.model, inputs).float(), strict=True)
                return
            predicted = self.model.logits(inputs).argmax(dim=1)
            weights = self.context.config.concepts.weights
            gradients = weighted_gradients(self.model, inputs, ClassLogit(predicted), weights).float()
        self.inputs += map(_Input, ids, predicted.tolist(), gradients)

    def finish(self, inputs: Sequence[_Input], states: Sequence[tuple[int, Tensor]]) -> None:
        """Test, write and show; here, because a strategy that forks keeps no memory of it."""
        context, config = self.context, self.context.config.concepts
        pooled = torch.stack([state for _, state in sorted(states, key=lambda item: item[0])])
        # In one order on any number of processes; padding of a distributed sampler is no input of its own.
        chosen = [one for _, one in sorted({one.sample_id: one for one in inputs}.items())]
        finite = [one for one in chosen if bool(one.gradient.isfinite().all())]
        predicted = torch.tensor([one.predicted for one in finite])
        names = context.data.label_names
        wanted = range(len(names)) if config.target == "all" else [config.target]
        classes = {names[index]: predicted == index for index in wanted if bool((predicted == index).any())}
        if not classes:
            raise InputError(
                f"none of the {len(finite)} inputs of the {config.split} split is predicted as the class of "
                f"concepts.target={config.target}. Raise concepts.num_samples, or set concepts.target=all."
            )
        rows = concept_rows(
            {name: pooled[torch.tensor(draws)] for name, draws in self.sets.concepts.items()},
            pooled[torch.tensor(self.sets.random)],
            torch.stack([one.gradient for one in finite]),
            classes,
            layers=chosen_layers(config.layers, pooled.shape[1]),
            seed=context.config.seed,
        )
        write_concepts(context.directory / CONCEPTS_FILE, rows)
        context.log(scalars(rows))
        MediaLog(context.loggers).log(
            context.trainer.global_step,
            images={"concepts": concept_map(rows)},
            tables={"concepts/rows": (ConceptRow._fields, [list(row) for row in rows])},
        )
        skipped = len(chosen) - len(finite)
        show(context, rows, [*self.sets.notes, *([f"{skipped} inputs without finite gradient"] if skipped else [])])


def scalars(rows: Sequence[ConceptRow]) -> dict[str, float]:
    """The scalar keys of the stage: in how many layers each concept is significant for each class."""
    found: dict[str, float] = {}
    for row in rows:
        key = f"concepts/{row.concept}/{row.target}/significant_layers"
        found[key] = found.get(key, 0.0) + row.significant
    return found


def show(context: RunContext, rows: Sequence[ConceptRow], notes: Sequence[str]) -> None:
    """Print a line for each concept and class: the share at every layer, a star where it is significant."""
    layers = sorted({row.layer for row in rows})
    shown = layers[:: -(-len(layers) // _SHOWN_LAYERS)]
    lines: dict[tuple[str, str], list[ConceptRow]] = {}
    for row in rows:
        lines.setdefault((row.concept, row.target), []).append(row)
    config = context.config.concepts
    context.console.table(
        f"concepts  share of inputs that the concept supports, by layer · {config.split} split · weights "
        f"{config.weights} · * differs from random sets (Welch, Bonferroni, p < {LEVEL})",
        ["concept", "class", "inputs", *(str(layer) for layer in shown), "accuracy"],
        [
            [
                concept,
                target,
                str(found[0].inputs),
                *(f"{row.share:.2f}{'*' if row.significant else ' '}" for row in found if row.layer in shown),
                f"{sum(row.cav_accuracy for row in found) / len(found):.2f}",
            ]
            for (concept, target), found in lines.items()
        ],
        " · ".join(notes),
    )
