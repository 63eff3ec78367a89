import doctest
import importlib
import subprocess
import sys

import pytest

from calig.pipeline import metrics

MODULES = [
    "classes", "dynamics", "faithfulness", "operators", "perturbation", "plausibility", "ranking", "rows", "statistics"
]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    import torch

    module = importlib.import_module(f"calig.pipeline.metrics.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0


def test_every_name_can_be_imported():
    assert set(metrics._NAMES_IN) == set(MODULES)
    for name in metrics._HOME:
        assert getattr(metrics, name).__name__ == name
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
