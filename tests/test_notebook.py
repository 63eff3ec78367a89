"""docs/example.ipynb: executed, small, of no particular machine; and its cells still run."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from test_cli import run_dir  # noqa: F401  # a whole tiny run

from calig.pipeline import Explanation

FILE = Path(__file__).parents[1] / "docs" / "example.ipynb"
CELLS = json.loads(FILE.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_it_is_executed_and_small():
    assert FILE.stat().st_size < 1_000_000
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"execute_result", "stream"}, "no error, nothing else"
    assert {output.get("name") for output in outputs} == {None, "stdout"}
    shown = [output["data"] for output in outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 3 and sum("text/html" in data for data in shown) == 3
    text = FILE.read_text()
    assert not any(name in text for name in ("/tmp/", "/home/", "/root/", "http"))


def test_its_script_made_it():
    source = (FILE.parents[1] / "scripts" / "make_notebook.py").read_text()
    for cell in CELLS:
        assert "".join(cell["source"]) in source


@pytest.mark.filterwarnings("ignore")
def test_its_cells_run(run_dir, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(run_dir)
    monkeypatch.chdir(tmp_path)
    space, shown = {}, []
    for cell in CODE:
        *lines, last = "".join(cell["source"]).splitlines()
        exec("\n".join(lines), space)
        shown.append(eval(last, space))
    assert sum(isinstance(value, Figure) for value in shown) == 3
    assert sum(isinstance(value, Explanation) for value in shown) == 3
