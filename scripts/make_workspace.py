"""Lay out a W&B workspace for calig runs: training curves beside faithfulness over epochs, pictures, the final table.

    python scripts/make_workspace.py --entity TEAM --project calig [--method ca_lig] [--name calig] [--dry-run]

Needs the extra `workspace` and, but for --dry-run, a login. The layout refers to keys (docs/logging.md), not to runs:
it fits all runs of the project, those of later too. Tables and line series get panels by W&B's own rules below it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

STEP = "trainer/global_step"
PROBED = {
    "comprehensiveness": "Comprehensiveness (higher is better)",
    "sufficiency": "Sufficiency (lower is better)",
    "token_f1": "Agreement with human rationales (token F1)",
}
FINAL = ("comprehensiveness", "sufficiency", "token_f1", "auprc")


def build(entity: str, project: str, method: str = "ca_lig", name: str = "calig") -> Any:
    """Build the specification; nothing is sent."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    prefix = f"val/explain/{method}"

    def lines(title: str, *keys: str) -> Any:
        return panels.LinePlot(title=title, x=STEP, y=list(keys))

    faithful = [
        lines(title, f"{prefix}/{metric}", f"val/explain/random/{metric}", f"{prefix}/reversed/{metric}")
        for metric, title in PROBED.items()
    ]
    training = [lines("Loss", "train/loss", "val/loss"), lines("Accuracy and F1", "val/accuracy", "val/f1"), *faithful]
    trust = [
        lines("Completeness gap (lower is better)", f"{prefix}/completeness_gap", f"{prefix}/completeness_gap_max"),
        lines("Drift: rank correlation with the probe before", f"{prefix}/drift"),
        lines("Share of special tokens", f"{prefix}/special_share"),
    ]
    pictures = [
        panels.MediaBrowser(title="Signed highlighting", media_keys=[f"{prefix}/tokens"]),
        panels.MediaBrowser(title="Layers x tokens", media_keys=[f"{prefix}/layers"]),
        panels.MediaBrowser(title="Share of each block", media_keys=[f"{prefix}/layer_profile_image"]),
    ]
    final = [
        panels.BarPlot(
            title=metric.replace("_", " "),
            metrics=[f"explain/{method}/{metric}", f"explain/random/{metric}", f"explain/{method}/reversed/{metric}"],
        )
        for metric in FINAL
    ]
    sections = {
        "Training beside faithfulness": training,
        "What it looks at": pictures,
        "How far to trust it": trust,
        "After the training": final,
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[workspaces.Section(name=title, panels=found, is_open=True) for title, found in sections.items()],
        auto_generate_panels=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the workspace and save it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", required=True, metavar="TEAM", help="user or team")
    parser.add_argument("--project", default="calig", help="logger.wandb.project of the runs (default: calig)")
    parser.add_argument("--method", default="ca_lig", help="probe.method of the runs (default: ca_lig)")
    parser.add_argument("--name", default="calig", help="name of the view (default: calig)")
    parser.add_argument("--dry-run", action="store_true", help="list the panels and send nothing")
    options = parser.parse_args(arguments)
    try:
        workspace = build(options.entity, options.project, options.method, options.name)
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed: pip install -e '.[workspace]' in the folder of calig")
    if options.dry_run:
        for section in workspace.sections:
            print(section.name)
            for panel in section.panels:
                print(f"  {type(panel).__name__:<13} {panel.title}")
        return 0
    workspace.save()
    print(workspace.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
