"""Makes the run directory that `tests/test_stored_run.py` reads; run it by hand when the layout of a run grows.

usage: python tests/stored_run/make_stored_run.py     (writes `run-<version>/` beside this file; older ones stay)
"""

import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from calig.pipeline.cli import main

HERE = Path(__file__).resolve().parent
KEPT = ("config.yaml", "versions.json", "summary.json", "metrics.csv", "explanations", "metrics", "probe")
TINY = (
    "data.size.train=64",
    "data.size.val=8",
    "data.size.test=8",
    "model.scratch.layers=2",
    "model.scratch.width=16",
    "model.scratch.heads=2",
    "model.scratch.intermediate=32",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
    "explain.num_samples=3",
    "explain.methods=[ca_lig, generic_attention, random]",
    "probe.num_samples=2",
    "probe.steps=8",
    "logger.wandb.mode=disabled",
)


def make(target: Path) -> None:
    """Run three samples through all stages in a temporary folder and keep what a reader needs."""
    with tempfile.TemporaryDirectory() as folder:
        # A relative run.dir, so that no path of this machine is kept.
        os.chdir(folder)
        if code := main(["run", "run.dir=runs/stored", "run.name=stored", *TINY]):
            raise SystemExit(code)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for name in KEPT:
            source = Path("runs/stored") / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, target / name)
        os.chdir(HERE)


if __name__ == "__main__":
    make(HERE / f"run-{version('calig')}")
