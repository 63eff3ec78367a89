"""Runs on images end to end: train and test, pre-train and fine-tune, break off and continue."""

import json
import os
import signal

import pytest
import torch
from images import class_folders
from test_data_real import DATA, needs
from test_resume_fit import logged, summary, weights
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTMAEForPreTraining

from calig.pipeline.cli import main
from calig.pipeline.pretraining import PretrainingModule

TINY = [
    "model.scratch.layers=2",
    "model.scratch.width=16",
    "model.scratch.heads=2",
    "model.scratch.intermediate=32",
    "model.scratch.patch_size=8",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
    "logger.wandb.mode=disabled",
    "probe.enabled=false",
]
SCENES = ["experiment=vision_quickstart", "data.size.train=96", "data.size.val=24", "data.size.test=24"]
PRETRAIN = ["pretrain.epochs=2", "pretrain.decoder_width=16", "pretrain.decoder_heads=2", "pretrain.decoder_layers=1"]


def run(folder, *arguments):
    """As it is asked for, but for what explains: `test_vision_explain.py`."""
    stages = [] if any(item.startswith("stages=") for item in arguments) else ["stages=[fit,test]"]
    return main(["run", f"run.dir={folder}", *TINY, *stages, *arguments])


def test_train_and_test_on_scenes(tmp_path):
    assert run(tmp_path / "run", *SCENES, "stages=[fit,test]") == 0
    found = summary(tmp_path / "run")
    assert {"train/loss", "val/accuracy", "val/f1", "test/accuracy", "test/f1"} <= found.keys()
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run" / "model")
    assert model.config.id2label == {0: "cross", 1: "ring", 2: "saltire", 3: "bars"}
    assert processor.size == {"height": 32, "width": 32}
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "train 96 · val 24 · test 24 · 4 classes" in log and "144 images with mask" in log
    # A run of its own tests the trained folder on the same scenes and comes to the same.
    again = [*SCENES, "stages=[test]", f"model.checkpoint={tmp_path / 'run' / 'model'}"]
    assert run(tmp_path / "again", *again) == 0
    assert summary(tmp_path / "again")["test/accuracy"] == found["test/accuracy"]


def test_pretrain_then_fit(tmp_path):
    folder = class_folders(tmp_path / "pictures", {"cat": 20, "dog": 20}, splits=("train", "val", "test"))
    own = [
        "experiment=cifar10_mae_tiny",
        "stages=[pretrain,fit,test]",
        "data.name=null",
        f"data.path={folder}",
        "data.batch_size=8",
        *PRETRAIN,
    ]
    assert run(tmp_path / "run", *own) == 0
    found = summary(tmp_path / "run")
    assert {"pretrain/loss", "pretrain/val/loss", "train/loss", "test/accuracy"} <= found.keys()
    assert found["pretrain/val/loss/best"] <= found["pretrain/val/loss"]
    rows = logged(tmp_path / "run")
    assert [row["epoch"] for row in rows if "pretrain/val/loss" in row] == ["0", "1"]
    assert any("train/loss" in row for row in rows)
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["model_type"] == "vit" and config["id2label"] == {"0": "cat", "1": "dog"}
    assert json.loads((tmp_path / "run" / "pretrained" / "config.json").read_text())["model_type"] == "vit_mae"
    # Fit has begun with the encoder: with a rate of almost nothing it has stayed there.
    still = [*own, "model.lr=1e-12", "model.weight_decay=0", "run.overwrite=true"]
    assert run(tmp_path / "run", *still) == 0
    encoder = ViTMAEForPreTraining.from_pretrained(tmp_path / "run" / "pretrained").vit
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
    for name, value in model.vit.named_parameters():
        assert torch.allclose(value, encoder.get_parameter(name), atol=1e-6), name


@pytest.mark.parametrize("batch", [3, 10])
def test_a_pretraining_that_is_broken_off_goes_on(tmp_path, monkeypatch, batch):
    own = [*SCENES, "model=mae_tiny", "stages=[pretrain,fit]", "data.batch_size=16", *PRETRAIN]
    assert run(tmp_path / "whole", *own) == 0
    step, count = PretrainingModule.training_step, 0

    def stopped(module, data, batch_idx):
        nonlocal count
        count += 1
        if count == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, data, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainingModule, "training_step", stopped)
        assert run(tmp_path / "broken", *own) == 143
    assert not (tmp_path / "broken" / "pretrained").exists()
    assert main(["run", f"run.resume={tmp_path / 'broken'}"]) == 0
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert logged(tmp_path / "broken") == logged(tmp_path / "whole")


def test_bad_input_leaves_nothing_behind(tmp_path, capsys):
    folder = class_folders(tmp_path / "pictures", {"cat": 6})
    own = ["experiment=mnist_vit", "data.name=null", f"data.path={folder}"]
    assert run(tmp_path / "run", *own) == 2
    assert "a classifier needs two classes" in capsys.readouterr().err and not (tmp_path / "run").exists()


@needs("cifar10")
def test_cifar10_archives(tmp_path):
    own = ["experiment=cifar10_vit", "model=vit_tiny", "data.name=null", f"data.path={DATA / 'cifar10'}"]
    limits = ["data.limit_train=64", "data.limit_val=20", "data.limit_test=20", "trainer.accelerator=cpu"]
    assert run(tmp_path / "run", *own, *limits) == 0
    assert "10 classes (airplane" in (tmp_path / "run" / "log.txt").read_text()


@needs("mnist")
def test_mnist_archive(tmp_path):
    own = ["experiment=mnist_vit", "data.name=null", f"data.path={DATA / 'mnist' / 'test.tar.gz'}"]
    assert run(tmp_path / "run", *own) == 2  # the split test alone
    limits = ["data.limit_train=64", "data.limit_val=20", "data.limit_test=20"]
    assert run(tmp_path / "run", *own[:2], f"data.path={DATA / 'mnist'}", *limits) == 0
    assert "10 classes (0 " in (tmp_path / "run" / "log.txt").read_text()
