"""Tasks that tests run in processes of their own, forked from a warm one: see `forked.run_worker`."""

import importlib
import json
import os
import resource
import signal
import socket
import time
from pathlib import Path

import torch
from conftest import make_bert
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader

from calig.callbacks import AttributionCallback
from calig.pipeline.attribution import attribute
from calig.pipeline.cli import main

torch.set_num_threads(1)

# What `calig run` imports on its way, so that a forked child has it.
WARM = (
    "calig.datamodules.remaining",
    "calig.pipeline.explainer",
    "calig.pipeline.models",
    "calig.pipeline.run",
    "calig.pipeline.stages.explain",
    "datasets",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
)


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

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.net, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for block in self.net.bert.encoder.layer:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

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
    strategy = arguments.pop("strategy", "ddp_fork" if devices > 1 else "auto")
    if arguments.pop("static_graph", False):
        strategy = DDPStrategy(start_method="fork", static_graph=True)
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": devices,
            "strategy": ForkedFSDP2(devices, tensor_parallel_size=1) if strategy == "fsdp2" else strategy,
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


class ForkedFSDP2(ModelParallelStrategy):
    """FSDP2 on forked processes; Lightning itself starts it by a script only."""

    def _configure_launcher(self):
        self._launcher = _MultiProcessingLauncher(self, start_method="fork")
        # The sharded weights of the processes do not go back into the one that started them.
        self._launcher._recover_results_in_main_process = lambda *_: None


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


def callback(devices, folder, arguments="{}", num_samples=7, count=9, **more):
    """Train with the callback; write the scalars it logged and the rows it wrote."""
    seed_everything(0, verbose=False)
    module = more.pop("module", None) or Classifier()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    strict = more.pop("strict", False)
    probe = AttributionCallback(num_samples=num_samples, folder=Path(folder) / "probe", batch_size=2, strict=strict)
    trainer = make_trainer(devices, folder, [probe, Scalars(folder)], max_epochs=2, **json.loads(arguments))
    trainer.fit(module, loader(8), loader(count))


def observed(folder, arguments):
    """Train on two processes without and with the callback; keep the weights."""
    for name in ("plain", "watched"):
        seed_everything(0, verbose=False)
        module = Classifier()
        torch.save(module.state_dict(), f"{folder}/start.pt")
        callbacks = [AttributionCallback(num_samples=5)] if name == "watched" else []
        callbacks.append(Weights(folder, name))
        trainer = make_trainer(2, folder, callbacks, max_epochs=2, **json.loads(arguments))
        trainer.fit(module, loader(13, size=2, shuffle=True), loader(7))


class Weights(Callback):
    """Saves the weights where they are, in a process of the training."""

    def __init__(self, folder, name):
        self.folder, self.name = Path(folder), name

    def on_train_end(self, trainer, module):
        state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if trainer.is_global_zero:
            torch.save(state, self.folder / f"{self.name}.pt")
            values = {key: float(value) for key, value in trainer.callback_metrics.items()}
            (self.folder / "scalars.json").write_text(json.dumps(values))


def failing_sample(folder, strict):
    """Training with two processes and a validation text that the model cannot read once the training has begun."""
    module = Classifier()
    forward = module.net.forward
    poison = make_rows(9)[3]["input_ids"]

    def refuse(*args, **kwargs):
        ids = kwargs["input_ids"]
        alone = module.trainer.global_step > 0 and "labels" not in kwargs  # the training's own passes have them
        if alone and any(torch.equal(row, poison) for row in ids[:, : len(poison)]):
            raise ValueError("no such token")
        return forward(*args, **kwargs)

    module.net.forward = refuse
    callback(2, folder, module=module, strict=strict, num_samples=9)


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


def command(*arguments):
    """`calig` with these arguments, which must end well."""
    code = main([*arguments, "--traceback"])
    assert code == 0, f"calig ended with {code}"


def command_on_a_full_disk(room, *arguments):
    """`calig` where no file can grow beyond `room` bytes; returns nothing, as `calig` must have ended with 1."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write that is too long then fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    code = main(list(arguments))
    assert code == 1, f"calig ended with {code}"


def side_by_side(folder, event, *arguments):
    """`calig` on two processes that a launcher has started; writes their exit codes, -9 for one that hung.

    `event` is JSON: {"at": "module:Class.function" or "module:function", "call": n, "rank": r, "send": signal} sends a
    process that signal when its n-th call begins; with "raise" instead, the call raises that OSError.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 1
            try:
                event = json.loads(event)
                if event and event["rank"] == rank:
                    happen(event)
                code = main(list(arguments))
            finally:
                os._exit(code)
        children.append(child)
    end = time.monotonic() + 60
    codes = {}
    while len(codes) < 2 and time.monotonic() < end:
        for child in set(children) - set(codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in set(children) - set(codes):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    Path(folder, "codes.json").write_text(json.dumps([codes.get(child, -9) for child in children]))


def happen(event):
    """Make the n-th call of a function send this process a signal, or raise."""
    module, _, path = event["at"].partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), []

    def changed(*args, **kwargs):
        calls.append(name)
        if len(calls) == event["call"]:
            if "raise" in event:
                raise OSError(event["raise"])
            os.kill(os.getpid(), event["send"])
        return function(*args, **kwargs)

    setattr(owner, name, changed)
