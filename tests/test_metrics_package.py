import doctest
import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

from calig.pipeline import metrics
from calig.pipeline.metrics.names import METRICS

MODULES = sorted({path.stem for path in Path(metrics.__file__).parent.glob("*.py")} - {"__init__"})


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    import torch

    module = importlib.import_module(f"calig.pipeline.metrics.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0


def test_the_worked_examples_of_the_docs():
    import torch

    page = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
    result = doctest.testfile(str(page), module_relative=False, globs={"torch": torch}, encoding="utf8")
    assert result.failed == 0 and result.attempted > 30


def test_the_docs_name_every_metric_that_can_be_chosen():
    page = (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").read_text()
    assert not [name for name in METRICS if f"| `{name}`" not in page]


def test_every_name_can_be_imported():
    assert set(metrics._NAMES_IN) <= set(MODULES)
    for name in metrics._HOME:
        value = getattr(metrics, name)
        assert getattr(value, "__name__", name) == name and not isinstance(value, types.ModuleType)
        assert name in dir(metrics)
    with pytest.raises(AttributeError, match="'comprehensivness'"):
        metrics.comprehensivness  # noqa: B018


def test_importing_is_cheap_and_stays_on_its_floor():
    code = (
        "import sys, calig.pipeline.metrics as m\n"
        "assert not {'torch', 'torchmetrics'} & set(sys.modules)\n"
        "m.summarise, m.faithfulness_rows, m.plausibility_rows\n"
        "assert 'torchmetrics' not in sys.modules\n"
        "m.Comprehensiveness\n"
        "assert not {'lightning', 'wandb', 'omegaconf'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
