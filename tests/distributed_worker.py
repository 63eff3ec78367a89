"""Run by `test_contexts.py` and `test_attribution_callback.py` in a process of its own: two gloo processes by fork.

usage: distributed_worker.py TASK DEVICES FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from conftest import make_bert
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from calig.callbacks import AttributionCallback
from calig.pipeline.attribution import attribute

torch.set_num_threads(1)


def make_rows(count):
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index in range(count):
        length = 5 + index % 4
        ids = torch.zeros(9, dtype=torch.long)
        ids[:length] = torch.randint(5, 60, (length,), generator=generator)
        ids[0], ids[length - 1] = 1, 2
        special = (ids == 0) | (ids == 1) | (ids == 2)
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": (ids != 0).long(),
                "special_tokens_mask": special.long(),
                "labels": int(ids.sum()) % 3,
                "sample_id": index,
            }
        )
    return rows


class Classifier(LightningModule):
    """What a user writes: the model under a name of their own, dropout on."""

    def __init__(self):
        super().__init__()
        self.net = make_bert(layers=2).train()  # dropout on, as in any training

    def run(self, batch):
        keys = ("input_ids", "attention_mask", "labels")
        return self.net(**{key: batch[key] for key in keys})

    def training_step(self, batch, batch_idx):
        loss = self.run(batch).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.run(batch).loss, sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.run(batch).logits

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class AttributeEverywhere(Callback):
    """Attributes every evaluation batch in the loop it is called from and writes what it got, by sample."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def _write(self, loop, trainer, module, batch):
        result = attribute(module.net, batch, "ca_lig", target="label")
        for index, row in zip(batch["sample_id"].tolist(), result.scores.tolist(), strict=True):
            state = {"inference": torch.is_inference_mode_enabled(), "grad": torch.is_grad_enabled(), "scores": row}
            (self.folder / f"{loop}-{index}.json").write_text(json.dumps(state))

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self._write(trainer.state.fn.value, trainer, module, batch)

    def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self._write("test", trainer, module, batch)

    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self._write("predict", trainer, module, batch)


def make_trainer(devices, folder, callbacks, **arguments):
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": devices,
            "strategy": "ddp_fork" if devices > 1 else "auto",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "callbacks": callbacks,
            **arguments,
        }
    )


def loader(count, size=3, shuffle=False):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(make_rows(count), size, shuffle=shuffle, generator=generator)


def contexts(devices, folder):
    """The four loops, each from the same untrained weights (a learning rate of 0 keeps them)."""
    for loop in ("fit", "validate", "test", "predict"):
        seed_everything(0, verbose=False)
        module = Classifier()
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=0.0)
        trainer = make_trainer(devices, folder, [AttributeEverywhere(folder)], num_sanity_val_steps=0)
        if loop == "fit":
            trainer.fit(module, loader(4), loader(5))
        else:
            getattr(trainer, loop)(module, loader(5))


def callback(devices, folder, num_samples=7, count=9, **arguments):
    """Train with the callback; write the scalars it logged and the rows it wrote."""
    seed_everything(0, verbose=False)
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    probe = AttributionCallback(num_samples=num_samples, folder=Path(folder) / "probe", batch_size=2)
    trainer = make_trainer(devices, folder, [probe, Scalars(folder)], max_epochs=2, **arguments)
    trainer.fit(module, loader(8), loader(count))


class Scalars(Callback):
    def __init__(self, folder):
        self.folder = Path(folder)

    def on_validation_end(self, trainer, module):
        values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        name = f"scalars-{trainer.current_epoch}-{trainer.global_rank}.json"
        (self.folder / name).write_text(json.dumps(values))


def empty_rank(devices, folder):
    """One probe sample on two processes: one of them has nothing to do and must not hang or differ."""
    callback(devices, folder, num_samples=1)


if __name__ == "__main__":
    task, devices, folder = sys.argv[1:]
    {"contexts": contexts, "callback": callback, "empty_rank": empty_rank}[task](int(devices), folder)
