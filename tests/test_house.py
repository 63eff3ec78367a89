"""The house itself: who may import whom, what loads what, what is packaged, what the docs promise."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    ({"calig.pipeline.errors"}, 0),
    ({"calig.pipeline.attribution", "calig.pipeline.config", "calig.pipeline.compose", "calig.pipeline.validate"}, 0),
    ({"calig.pipeline.metrics.names", "calig.pipeline.tasks", "calig.pipeline.validate_modality"}, 0),
    ({"calig.pipeline.metrics", "calig.pipeline.records", "calig.pipeline.render"}, 1),
    ({"calig.pipeline.batch_facts", "calig.pipeline.explainer", "calig.pipeline.heads", "calig.pipeline.measuring"}, 1),
    ({"calig.pipeline.explained", "calig.pipeline.image_rows", "calig.pipeline.perturbers"}, 1),
    ({"calig.pipeline.explanation", "calig.pipeline.loading"}, 1),
    ({"calig.pipeline.calibrating", "calig.pipeline.calibration"}, 1),
    ({"calig.pipeline.limits", "calig.pipeline.manifest", "calig.pipeline.perturbation"}, 1),
    ({"calig.pipeline.benchmarking", "calig.pipeline.costs"}, 1),
    ({"calig.pipeline.concept_rows", "calig.pipeline.concept_testing"}, 1),
    ({"calig.pipeline.flow_rows"}, 1),
    ({"calig.callbacks", "calig.datamodules", "calig.pipeline.module", "calig.pipeline.models"}, 2),
    ({"calig.pipeline.task_metrics"}, 2),
    ({"calig.pipeline.adapters", "calig.pipeline.checkpoint", "calig.pipeline.devices"}, 2),
    ({"calig.pipeline.image_models", "calig.pipeline.pretraining"}, 2),
    ({"calig.pipeline.signals"}, 2),
    (
        {
            "calig.pipeline.console",
            "calig.pipeline.directory",
            "calig.pipeline.headlines",
            "calig.pipeline.loggers",
            "calig.pipeline.wandb_run",
        },
        3,
    ),
    ({"calig.pipeline.run", "calig.pipeline.stages", "calig.pipeline.flow_summary"}, 3),
    ({"calig.pipeline.opening", "calig.pipeline.explaining", "calig.pipeline.compare"}, 3),
    ({"calig.pipeline.folders", "calig.pipeline.image_opening"}, 3),
    ({"calig.pipeline.explain_command", "calig.pipeline.explain_request"}, 3),
    ({"calig.pipeline.next_token", "calig.pipeline.vocabulary"}, 3),
    ({"calig.pipeline.cli"}, 4),
]


def sources():
    for folder in ("pipeline", "callbacks", "datamodules"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("calig", *(part for part in parts if part != "__init__")))


def floor(name):
    found = [(len(room), level) for rooms, level in FLOORS for room in rooms if (name + ".").startswith(room + ".")]
    return max(found)[1] if found else None


def imports(path):
    """Modules that a file imports at run time, in functions too; imports for type checkers do not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_from_their_own_floor_or_below(path):
    own = floor(module_name(path))
    if own is None:
        assert path.name == "__init__.py", f"{path} is on no floor; add it to FLOORS"
        return
    for name in imports(path):
        assert name.split(".")[0] not in ("pipeline", "callbacks", "datamodules", "configs"), f"bare import of {name}"
        level = floor(name)
        assert level is None or level <= own, f"floor {own} imports {name} of floor {level}"


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("calig.pipeline", ("torch", "lightning", "wandb", "omegaconf", "transformers")),
        ("calig.pipeline.attribution", ("torch", "lightning", "wandb", "omegaconf", "transformers")),
        ("calig.pipeline.attribution.api", ("lightning", "wandb", "omegaconf", "torchmetrics", "datasets")),
        ("calig.pipeline.metrics.names", ("torch", "lightning", "wandb", "omegaconf")),
        ("calig.pipeline.metrics.faithfulness", ("lightning", "wandb", "omegaconf")),
        ("calig.pipeline.render.report", ("torch", "lightning", "wandb", "omegaconf", "matplotlib.pyplot")),
        ("calig.pipeline.config", ("torch", "lightning", "wandb", "transformers")),
    ],
)
def test_what_a_room_loads(module, forbidden):
    code = f"import sys, {module}; print([name for name in {forbidden!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_package_folder_is_in_the_distribution():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for folder in ("pipeline", "callbacks", "datamodules", "configs"):
        for init in (ROOT / folder).rglob("__init__.py"):
            assert module_name(init) in settings["packages"]
        for data in (ROOT / folder).rglob("*"):
            if data.is_file() and data.suffix in (".yaml", ".html", ".css", ".js"):
                assert any(data.match(pattern) for pattern in settings["package-data"]["*"])
                assert (data.parent / "__init__.py").exists(), f"{data} lies in no package"


def test_direct_imports_are_declared_and_nothing_else_is():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[><=~ ]", item)[0].lower() for item in project["dependencies"]}
    names = {"PIL": "pillow", "jinja2": "jinja2"}
    used = {name.split(".")[0] for path in sources() for name in imports(path)} - {"calig", "__future__"}
    used = {names.get(name, name) for name in used if name not in sys.stdlib_module_names}
    # Extras are imported where a setting or a method asks for them.
    for extra, module in (("peft", "peft"), ("compare", "captum")):
        assert project["optional-dependencies"][extra]
        used -= {module}
    assert used == declared, (
        f"imported and not declared: {used - declared}; declared and not imported: {declared - used}"
    )


def test_files_are_rooms_not_halls():
    for path in sources():
        assert len(path.read_text().splitlines()) <= 500, path


def test_the_readme_opens_with_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert text.index("make demo") < text.index("make test") < 2500
    assert "download.pytorch.org/whl/cpu" in text and "<!--" not in text


def test_documented_commands_and_files_exist():
    from calig.pipeline.compose import compose

    text = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    for name in set(
        re.findall(r"`((?:docs|scripts|configs|tests|pipeline|callbacks|datamodules)/[\w/.]+\.\w+)`", text)
    ):
        assert (ROOT / name).exists(), f"the docs name {name}"
    for name in set(re.findall(r"experiment=(\w+)(?![\w.])", text)) - {"NAME"}:
        compose([f"experiment={name}"], check=False)
