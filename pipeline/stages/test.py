"""test: what the best weights reach on the test split, by the metrics of the task."""

from __future__ import annotations

from calig.pipeline.run import RunContext


def run_stage(context: RunContext) -> None:
    """Evaluate on the test split."""
    data, module = context.data, context.module
    trainer = context.trainer
    trainer.test(module, data, verbose=False)
    values = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("test/")}
    if context.is_main:
        context.directory.add_summary(values)
    shown = " · ".join(f"{key.removeprefix('test/')} {value:.4f}" for key, value in sorted(values.items()))
    context.console.say(f"test     {len(data.dataset('test')):,} examples · {shown}")
