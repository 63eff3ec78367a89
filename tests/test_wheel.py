"""A wheel, installed outside the repository, runs what a user brings: nothing depends on the checkout."""

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = ("pipeline", "callbacks", "datamodules", "configs", "pyproject.toml", "README.md", "LICENSE")
FAST = (
    "trainer.enable_progress_bar=false",
    "logger=none",
    "probe.num_samples=2",
    "probe.steps=4",
    "explain.num_samples=4",
    "explain.steps=8",
    "explain.methods=[ca_lig,input_x_gradient,random]",
)
SMALL = (
    "model.scratch.layers=2",
    "model.scratch.width=16",
    "model.scratch.heads=2",
    "model.scratch.intermediate=32",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that a wheel of the working tree was installed into."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("building a wheel needs setuptools in this environment")
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "site"
    source.mkdir()
    for name in PACKAGED:
        path = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, source / name, ignore=ignore) if path.is_dir() else shutil.copy2(path, source / name)
    quiet = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
    pip = (sys.executable, "-m", "pip")
    outside(folder, *pip, "wheel", *quiet, "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    [wheel] = folder.glob("calig-*.whl")
    outside(folder, *pip, "install", *quiet, "--target", str(target), str(wheel))
    missing = [file for file in packaged(source) if not (target / "calig" / file).exists()]
    assert not missing, f"not in the wheel: {missing}"
    shutil.rmtree(source)
    return target


def packaged(folder):
    """What the packages hold, Python and data."""
    kinds = {".py", ".yaml", ".html", ".css", ".js", ".typed"}
    names = [path for path in PACKAGED if (folder / path).is_dir()]
    return [path.relative_to(folder) for name in names for path in (folder / name).rglob("*") if path.suffix in kinds]


@pytest.fixture(scope="module")
def calig(installed, tmp_path_factory):
    """Runs the command of the installed wheel in an empty folder."""
    here = tmp_path_factory.mktemp("elsewhere")

    def command(*arguments):
        return outside(here, sys.executable, "-m", "calig.pipeline.cli", *arguments, site=installed)

    command.folder = here
    command.site = installed
    return command


def outside(folder, *command, site=None):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(site or "")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def complete(run, samples=4):
    """A finished run: its rows, its page, its model."""
    import pyarrow.parquet as pq

    rows = [row for part in (run / "explanations").glob("*.parquet") for row in pq.read_table(part).to_pylist()]
    assert {row["method"] for row in rows} == {"ca_lig", "input_x_gradient", "random"}
    assert len({row["sample_id"] for row in rows}) == samples
    assert (run / "report.html").stat().st_size > 10_000 and (run / "model" / "config.json").exists()
    return json.loads((run / "summary.json").read_text())


@pytest.fixture(scope="module")
def quickstart(calig):
    small = ("data.size.train=96", "data.size.val=16", "data.size.test=16", "trainer.max_epochs=1")
    calig("run", *small, *SMALL, *FAST)
    return calig.folder / "runs" / "quickstart"


def test_it_is_the_wheel_that_is_imported(calig):
    code = "import calig.pipeline, calig.callbacks, calig.configs as c; print(calig.pipeline.__file__, *c.__path__)"
    out = outside(calig.folder, sys.executable, "-c", code, site=calig.site)
    assert all(Path(path).is_relative_to(calig.site) for path in out.split()), out
    code = "import calig.callbacks, importlib.metadata as m; print(m.version('calig'), calig.callbacks.__file__)"
    version, file = outside(calig.folder, sys.executable, "-c", code, site=calig.site).split()
    assert version and Path(file).is_relative_to(calig.site)


def test_the_quickstart(quickstart):
    assert "explain/ca_lig/comprehensiveness" in complete(quickstart)


def test_an_own_csv(calig):
    path = calig.folder / "reviews.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["review", "verdict"])
        words = ("fine", "lovely", "poor", "dreary")
        writer.writerows((f"the plot is {words[i % 4]}, scene {i}", "yes" if i % 4 < 2 else "no") for i in range(60))
    columns = ("data.columns.text=review", "data.columns.label=verdict")
    calig("run", "data=files", "data.path=reviews.csv", *columns, *SMALL, *FAST, "trainer.max_epochs=1", "run.dir=own")
    assert "test/accuracy" in complete(calig.folder / "own")


def test_an_own_hugging_face_folder(calig, quickstart):
    shutil.copytree(quickstart / "model", calig.folder / "my-model")
    small = ("data.size.train=32", "data.size.val=8", "data.size.test=8", "trainer.max_epochs=1")
    calig("run", "model.name=my-model", "run.dir=from-folder", *small, *FAST)
    complete(calig.folder / "from-folder")


def test_an_own_yaml(calig):
    (calig.folder / "mine.yaml").write_text(
        "defaults: {model: tiny, data: controlled, explain: default, trainer: cpu, logger: none}\n"
        "data: {size: {train: 32, val: 8, test: 8}}\n"
        "trainer: {max_epochs: 1, enable_progress_bar: false}\n"
        "probe: {enabled: false}\n"
        "explain: {methods: [ca_lig, input_x_gradient, random], num_samples: 3, steps: 8}\n"
    )
    calig("run", "experiment=mine.yaml", *SMALL)
    complete(calig.folder / "runs" / "mine", samples=3)


def test_the_script_for_foreign_projects(calig):
    shutil.copy2(ROOT / "docs" / "foreign_project.py", calig.folder / "project.py")
    out = outside(calig.folder, sys.executable, "project.py", site=calig.site)
    assert "val/explain/ca_lig/completeness_gap" in out
    assert list((calig.folder / "explanations").glob("epoch-*.parquet"))
