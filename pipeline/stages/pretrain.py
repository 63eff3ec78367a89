"""pretrain: a masked autoencoder on the training images; its encoder is what fit starts from."""

from __future__ import annotations

import math

from calig.pipeline.loggers import drop_rows, logged_rows
from calig.pipeline.run import PRETRAINED, RunContext
from calig.pipeline.stages.fit import last_values, save_model


def run_stage(context: RunContext) -> None:
    """Train and save the autoencoder as a Hugging Face folder, with the image processor.

    A training that was broken off goes on from its newest checkpoint that is whole.

    Raises:
        InputError: The model is no masked autoencoder; or there are checkpoints, and none can be read.
        RuntimeError: The training diverged.
        Stopped: A signal asked for the end; a checkpoint is written.
    """
    from lightning.pytorch import seed_everything

    from calig.callbacks.collectives import from_first
    from calig.callbacks.exact_resume import ExactResume
    from calig.pipeline.checkpoint import find_resumable
    from calig.pipeline.image_models import load_autoencoder
    from calig.pipeline.module import OptimizerSettings
    from calig.pipeline.pretraining import PretrainingModule

    config, directory, data = context.config.pretrain, context.directory, context.data
    seed_everything(context.config.seed, workers=True, verbose=False)
    model = load_autoencoder(context.config.model, config, data.processor)
    size = sum(parameter.numel() for parameter in model.parameters())
    context.console.say(f"model    {model.config.model_type} · {size / 1e6:.1f} M parameters with its decoder")
    optimizer = OptimizerSettings(config.lr, config.weight_decay, config.warmup, "cosine")
    checkpoints = directory / "checkpoints" / "pretrain"
    resume = ExactResume(checkpoints, context.signals, **vars(context.config.checkpoint))
    found = None if directory.others else find_resumable(checkpoints, context.console.warn)
    last, step = found or (None, 0)
    if context.is_main:
        drop_rows(directory.path, step, pretraining=True)
    trainer = context.make_trainer([resume], max_epochs=config.epochs, max_steps=-1)
    trainer.fit(PretrainingModule(model.train(), optimizer), data, ckpt_path=last)
    resume.end_if_asked()

    def finish() -> None:
        rows = [row for row in logged_rows(directory.path) if row.get("pretrain/loss") or row.get("pretrain/val/loss")]
        values = {key: value for key, value in last_values(rows).items() if key.startswith("pretrain/")}
        values |= {key: float(value) for key, value in trainer.callback_metrics.items()}
        if diverged := [key for key, value in values.items() if not math.isfinite(value)]:
            raise RuntimeError(
                f"the pre-training diverged: {', '.join(diverged)} is not finite, so nothing was saved as a model. "
                f"Lower pretrain.lr (now {config.lr:g})."
            )
        save_model(model, data.processor, directory / PRETRAINED)
        context.summarise(values)
        context.console.say(
            f"pretrain loss {values['pretrain/loss']:.4f}, {trainer.current_epoch} epochs, {trainer.global_step:,} "
            f"steps → {directory / PRETRAINED}"
        )

    from_first(finish)  # not stopped by a signal: what the training came to is saved first
    # The classifier that was made before knows nothing of the encoder, and the data stand behind their last epoch.
    vars(context).pop("module", None)
    data.restart()
