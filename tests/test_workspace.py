"""The specification of the W&B workspace; whether W&B takes it cannot be tested without an account."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "make_workspace.py"
RUN = ROOT / "tests" / "stored_run" / "run-0.1.0"


@pytest.fixture
def build():
    pytest.importorskip("wandb_workspaces", reason="needs the extra workspace")
    spec = importlib.util.spec_from_file_location("make_workspace", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build


def keys(workspace, name):
    (section,) = [section for section in workspace.sections if section.name == name]
    found = [
        getattr(panel, "y", None) or getattr(panel, "metrics", None) or panel.media_keys for panel in section.panels
    ]
    return [key if isinstance(key, str) else key.name for panel in found for key in panel]


@pytest.mark.filterwarnings("ignore")
def test_every_panel_shows_a_key_that_a_run_logs(build):
    workspace = build("team", "project")
    assert (workspace.entity, workspace.project, workspace.name) == ("team", "project", "calig")
    summary = set(json.loads((RUN / "summary.json").read_text()))
    sections = [section.name for section in workspace.sections]
    assert len(sections) == 4
    for name in sections:
        found = keys(workspace, name)
        assert found
        if name == "What it looks at":
            assert set(found) == {f"val/explain/ca_lig/{key}" for key in ("tokens", "layers", "layer_profile_image")}
        else:
            # The stored run has one probe, and so no drift.
            assert set(found) - {"val/explain/ca_lig/drift"} <= summary, name
    assert {"train/loss", "val/explain/ca_lig/comprehensiveness"} <= set(keys(workspace, sections[0])), "side by side"


@pytest.mark.filterwarnings("ignore")
def test_curves_run_over_the_step_that_the_runs_log(build):
    workspace = build("team", "project", method="generic_attention")
    lines = [panel for section in workspace.sections for panel in section.panels if type(panel).__name__ == "LinePlot"]
    assert lines and all("trainer/global_step" in str(panel.x) for panel in lines)
    assert all("ca_lig" not in str(panel.y) for panel in lines)


def test_without_the_extra_it_says_how_to_get_it(tmp_path):
    (tmp_path / "wandb_workspaces.py").write_text("raise ModuleNotFoundError('gone', name='wandb_workspaces')")
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['x', '--entity', 'e', '--dry-run']; "
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        done.returncode == 1
        and "pip install -e '.[workspace]' in the folder of calig" in done.stderr
        and "Traceback" not in done.stderr
    )
