"""AttributionCallback in Trainers of every kind: their loops, what fails in them, their loggers, the other package."""

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_bert
from distributed_worker import loader, make_rows, make_trainer
from test_foreign import GAP, PREFIX, STEPS, Module, fit, plain, weights

from calig.callbacks import AttributionCallback
from calig.pipeline.errors import InputError

# ------------------------------------------------------------------------------------------------------------ loops


def epochs(folder):
    return sorted(int(path.name.split("-")[1]) for path in (folder / "probe").glob("*.parquet"))


@pytest.mark.parametrize(("every", "check", "probed"), [(2, 1, [1, 3, 5]), (2, 3, [2, 5]), (3, 2, [3, 5]), (1, 4, [3])])
def test_every_n_epochs_meets_check_val_every_n_epoch(tmp_path, every, check, probed):
    probe = AttributionCallback(num_samples=2, every_n_epochs=every, folder=tmp_path / "probe", **STEPS)
    fit(tmp_path, loader(4), probe=probe, max_epochs=6, check_val_every_n_epoch=check)
    assert epochs(tmp_path) == probed


def test_mid_epoch_validation_and_no_sanity_probe(tmp_path):
    probe, _ = fit(tmp_path, loader(4), train=loader(12), val_check_interval=2, num_sanity_val_steps=2)
    assert len(list((tmp_path / "probe").iterdir())) == 2
    assert probe.state_dict()["epoch"] == 0


@pytest.mark.parametrize("arguments", [{"overfit_batches": 1}, {"limit_val_batches": 1}, {"num_sanity_val_steps": 0}])
def test_trainer_arguments_that_change_the_loaders(tmp_path, arguments):
    _, trainer = fit(tmp_path, loader(5, shuffle=True), **arguments)
    assert trainer.callback_metrics[f"{PREFIX}/failed"] == 0


def test_fast_dev_run_tries_the_probe_and_writes_nothing(tmp_path):
    probe = AttributionCallback(num_samples=64, every_n_epochs=5, folder=tmp_path / "probe", **STEPS)
    _, trainer = fit(tmp_path, loader(5), probe=probe, fast_dev_run=True)
    assert GAP in trainer.callback_metrics and len(probe.state_dict()["ids"]) == 2
    assert not (tmp_path / "probe").exists()


def test_no_validation_is_an_error_and_no_probe_a_warning(tmp_path):
    trainer = make_trainer(1, tmp_path, [AttributionCallback()])
    with pytest.raises(InputError, match="needs a validation loader and a `validation_step`"):
        trainer.fit(Module(), loader(4))
    with pytest.warns(UserWarning, match="nothing will be explained.*every_n_epochs=3 of 1 epochs"):
        fit(tmp_path, loader(4), probe=AttributionCallback(every_n_epochs=3))
    with pytest.warns(UserWarning, match="nothing will be explained.*limit_val_batches=0"):
        fit(tmp_path, loader(4), limit_val_batches=0)


def test_test_and_predict_are_none_of_its_business(tmp_path):
    module = Module()
    module.test_step, module.predict_step = module.validation_step, lambda batch, batch_idx: None
    trainer = make_trainer(1, tmp_path, [AttributionCallback(operator="mask")])
    trainer.test(module, loader(4), verbose=False)
    trainer.predict(module, loader(4))
    assert not any(key.startswith("val/explain") for key in trainer.callback_metrics)


def test_resuming_continues_the_drift(tmp_path):
    saved = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    whole, trainer = fit(tmp_path / "a", loader(5), callbacks=[], max_epochs=2)
    fit(tmp_path / "b", loader(5), callbacks=[saved], enable_checkpointing=True, max_epochs=1)
    seed_everything(0, verbose=False)
    probe = AttributionCallback(num_samples=4, **STEPS)
    again = make_trainer(1, tmp_path, [probe], max_epochs=2)
    again.fit(Module(), loader(4), loader(5), ckpt_path=tmp_path / "ckpt" / "last.ckpt", weights_only=True)
    assert f"{PREFIX}/drift" in again.callback_metrics and f"{PREFIX}/drift" in trainer.callback_metrics
    assert probe.state_dict()["epoch"] == 1 and probe.state_dict()["texts"] == whole.state_dict()["texts"]


def test_two_callbacks_with_different_methods_and_never_two_with_one(tmp_path):
    other = AttributionCallback("attention_rollout", num_samples=3)
    _, trainer = fit(tmp_path, loader(5), callbacks=[other])
    assert GAP in trainer.callback_metrics
    assert "val/explain/attention_rollout/comprehensiveness@attention" in trainer.callback_metrics
    with pytest.raises(InputError, match="two callbacks with method 'ca_lig' .* one AttributionCallback per method"):
        fit(tmp_path, loader(5), callbacks=[AttributionCallback(num_samples=3)])


# --------------------------------------------------------------------------------------------------------- failures


def test_a_sample_that_cannot_be_explained_is_counted_and_named_once(tmp_path):
    class Broken(torch.utils.data.Dataset):
        rows = plain(make_rows(5))
        validating = False

        def __len__(self):
            return 5

        def __getitem__(self, index):
            if index == 3 and Broken.validating:
                raise OSError("the file of row 3 is gone")
            return self.rows[index]

    class Switch(Module):
        def on_validation_epoch_start(self):
            Broken.validating = False

        def on_validation_batch_end(self, outputs, batch, batch_idx):
            Broken.validating = batch_idx == 1  # the loader has read all; the probe reads next

    probe = AttributionCallback(num_samples=5, batch_size=4, **STEPS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, trainer = fit(
            tmp_path, DataLoader(Broken(), 3), probe=probe, module=Switch(), max_epochs=3, num_sanity_val_steps=0
        )
    said = [str(item.message) for item in caught if "could not be explained" in str(item.message)]
    assert len(said) == 1 and "1 of 5 samples" in said[0] and "sample 3: OSError: the file of row 3 is gone" in said[0]
    assert trainer.current_epoch == 3
    assert trainer.callback_metrics[f"{PREFIX}/failed"] == 1
    assert probe.state_dict()["ids"] == [0, 1, 2, 4]


def test_a_model_that_turns_nan_does_not_end_the_training(tmp_path):
    class Nan(Module):
        def on_train_epoch_end(self):
            torch.nn.init.constant_(self.net.classifier.weight, float("nan"))

    with pytest.warns(UserWarning, match="4 of 4 samples could not be explained"):
        _, trainer = fit(tmp_path, loader(4), module=Nan(), max_epochs=3)
    assert trainer.callback_metrics[f"{PREFIX}/failed"] == 4 and trainer.current_epoch == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 7}, "names a class that is not there; the model has 3 classes"),
        ({"target": "label"}, "target='label' needs `labels`"),
        ({"method": "attention_rollout"}, "'mpnet' does not use the attention interface.*Methods that work"),
    ],
)
def test_what_cannot_work_at_all_is_said_before_the_first_step(tmp_path, arguments, message):
    from transformers import MPNetConfig, MPNetForSequenceClassification

    rows = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in make_rows(4)]
    module = Module(lambda batch: (batch, torch.zeros(len(batch["input_ids"]), dtype=torch.long)))
    if "method" in arguments:
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
        module.net = MPNetForSequenceClassification(MPNetConfig(vocab_size=60, **sizes))
    with pytest.raises(ValueError, match=message):
        data = DataLoader(rows, 2)
        fit(tmp_path, data, probe=AttributionCallback(num_samples=2, **arguments), module=module, train=data)
    assert module.trainer.global_step == 0


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_shard_are_refused_with_the_way_out(name):
    import lightning.pytorch.strategies as strategies

    from calig.callbacks.target import check_strategy

    derived = type("Mine", (getattr(strategies, name),), {"__init__": lambda self: None})
    with pytest.raises(InputError, match=f"under {name}, which shards.*consolidate the checkpoint.*strategy=ddp"):
        check_strategy(derived())


DISTRIBUTED = """
import sys
from lightning.pytorch import Callback
from distributed_worker import *

class Rows(torch.utils.data.Dataset):
    rows, broken = make_rows(7), False
    __len__ = lambda self: 7
    def __getitem__(self, index):
        if index == 3 and Rows.broken:
            raise OSError("the file is gone")
        return self.rows[index]

class Break(Callback):
    def on_validation_batch_end(self, *_, **__): Rows.broken = True
    def on_validation_start(self, *_): Rows.broken = False
    on_validation_end = on_validation_start

folder = sys.argv[1]
probe = AttributionCallback(num_samples=7, batch_size=2, steps=4)
trainer = make_trainer(2, folder, [Break(), probe, Scalars(folder)], max_epochs=2, num_sanity_val_steps=0)
trainer.fit(Classifier(), loader(8), DataLoader(Rows(), 4))
"""


def test_a_sample_that_fails_on_one_of_two_processes_does_not_stop_the_other(tmp_path):
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": here}
    command = [sys.executable, "-c", DISTRIBUTED, str(tmp_path)]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (json.loads((tmp_path / f"scalars-1-{rank}.json").read_text()) for rank in (0, 1))
    assert one[f"{PREFIX}/failed"] == two[f"{PREFIX}/failed"] == 1
    assert one[GAP] == two[GAP] and f"{PREFIX}/drift" in one


def test_a_folder_that_cannot_be_written_does_not_end_the_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    probe = AttributionCallback(num_samples=2, folder=tmp_path / "file", **STEPS)
    with pytest.warns(UserWarning, match="could not be written"):
        _, trainer = fit(tmp_path, loader(4), probe=probe)
    assert GAP in trainer.callback_metrics


# ---------------------------------------------------------------------------------------------- loggers and packages


def test_a_tensorboard_logger_gets_images_and_text(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    keys = []

    class Board:
        def add_image(self, key, image, step, dataformats):
            assert dataformats == "HWC" and image.dtype == torch.uint8 and image.ndim == 3
            keys.append(key)

        def add_text(self, key, text, step):
            assert "<" not in text and "**" in text
            keys.append(key)

    class TensorBoardLogger(CSVLogger):
        experiment = Board()

        def log_metrics(self, metrics, step=None):
            self.last = metrics

        def save(self):
            pass

    fit(tmp_path, loader(4), logger=(logger := TensorBoardLogger(tmp_path)))
    charts = ("perturbation_removed", "perturbation_kept", "layer_profile_chart")
    assert set(keys) == {f"{PREFIX}/{name}" for name in ("layers", "layer_profile_image", "tokens", *charts)}
    assert GAP in logger.last


def test_what_tensorboard_has_written_is_read_back(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from lightning.pytorch.loggers import TensorBoardLogger
    from PIL import Image

    fit(tmp_path, loader(4), logger=TensorBoardLogger(tmp_path, name="board", version=""))
    events = reading.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert GAP in events.Tags()["scalars"] and events.Scalars(GAP)[0].step > 0
    for name in ("layers", "layer_profile_image", "perturbation_removed", "perturbation_kept", "layer_profile_chart"):
        (event,) = events.Images(f"{PREFIX}/{name}")
        picture = Image.open(io.BytesIO(event.encoded_image_string))
        assert picture.width > 300 and len(picture.getcolors(1 << 20)) > 5, name
    (text,) = events.Tensors(f"{PREFIX}/tokens/text_summary")
    assert b"**" in text.tensor_proto.string_val[0]


def test_in_a_pytorch_lightning_trainer(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")
    from lightning.pytorch.loggers import CSVLogger
    from pytorch_lightning.loggers import CSVLogger as OtherCSVLogger

    class Own(lightning.LightningModule):
        __init__ = lambda self: (lightning.LightningModule.__init__(self), setattr(self, "net", make_bert(layers=2)))[0]
        read = staticmethod(lambda batch: (batch, batch["labels"]))
        training_step, validation_step = Module.training_step, Module.validation_step
        configure_optimizers = Module.configure_optimizers

    def train(epochs, probes, ckpt=None, **arguments):
        seed_everything(0, verbose=False)
        saved = lightning.callbacks.ModelCheckpoint(tmp_path / "ckpt", monitor=monitor, save_last=True)
        stop = lightning.callbacks.EarlyStopping(monitor, patience=9)
        quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        callbacks = [saved, stop, *probes] if probes else []
        trainer = lightning.Trainer(
            max_epochs=epochs, callbacks=callbacks, default_root_dir=tmp_path, **quiet, **arguments
        )
        module = Own()
        trainer.fit(module, loader(6, shuffle=True), loader(5), ckpt_path=ckpt)
        return trainer, module

    monitor = f"{PREFIX}/comprehensiveness@attention"
    loggers = [CSVLogger(tmp_path, "one"), OtherCSVLogger(tmp_path, "two")]
    probe = AttributionCallback(num_samples=4, folder=tmp_path / "probe", **STEPS)
    trainer, watched = train(2, [probe], logger=loggers)
    assert GAP in trainer.callback_metrics and epochs(tmp_path) == [0, 1]
    for logger in loggers:
        assert GAP in (Path(logger.log_dir) / "metrics.csv").read_text()
    _, plain_module = train(2, [], logger=False, enable_checkpointing=False)
    assert torch.equal(weights(watched), weights(plain_module))
    again = AttributionCallback(num_samples=4, **STEPS)
    trainer, _ = train(3, [again], ckpt=tmp_path / "ckpt" / "last.ckpt", logger=False)
    assert again.state_dict()["epoch"] == 2 and f"{PREFIX}/drift" in trainer.callback_metrics
    trainer.validate(watched, loader(5), verbose=False)
    assert GAP in trainer.callback_metrics
