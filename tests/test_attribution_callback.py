"""AttributionCallback: no observer effect, the same numbers on any number of processes, keys, errors, foreign use."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from distributed_worker import Classifier, loader, make_rows, make_trainer
from forked import run_worker
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from calig.callbacks import AttributionCallback
from calig.pipeline.errors import InputError


def train(folder, callbacks, **arguments):
    seed_everything(0, verbose=False)
    module = Classifier()
    trainer = make_trainer(1, folder, callbacks, max_epochs=2, **arguments)
    trainer.fit(module, loader(12, shuffle=True), loader(7))
    return module, trainer


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"val_check_interval": 1},
        {"accumulate_grad_batches": 3, "val_check_interval": 1},
    ],
)
def test_training_is_bit_identical_with_and_without_it(tmp_path, arguments):
    plain, _ = train(tmp_path, [], **arguments)
    state = torch.get_rng_state()
    watched, trainer = train(tmp_path, [AttributionCallback(num_samples=4)], **arguments)
    assert "val/explain/ca_lig/completeness_gap" in trainer.callback_metrics
    assert torch.equal(state, torch.get_rng_state())
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(module.training == other.training for module, other in zip(plain.modules(), watched.modules()))


def test_a_dataset_that_draws_random_numbers_does_not_disturb_the_training(tmp_path):
    class Noisy(torch.utils.data.Dataset):
        rows = make_rows(7)

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            torch.rand(3)
            return self.rows[index]

    weights = []
    for callbacks in ([], [AttributionCallback(num_samples=4)]):
        seed_everything(0, verbose=False)
        module = Classifier()
        trainer = make_trainer(1, tmp_path, callbacks, max_epochs=2)
        trainer.fit(module, loader(12, shuffle=True), torch.utils.data.DataLoader(Noisy(), 3))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.equal(*weights)


def test_scalars_are_there_before_checkpoint_and_early_stopping_look(tmp_path):
    key = "val/explain/ca_lig/comprehensiveness"
    key = f"{key}@attention"  # without a tokenizer there is no mask token
    checkpoint = ModelCheckpoint(tmp_path, monitor=key, mode="max")
    stop = EarlyStopping(key, mode="max", min_delta=1e9, patience=1)
    _, trainer = train(tmp_path, [AttributionCallback(num_samples=4), checkpoint, stop], enable_checkpointing=True)
    assert checkpoint.best_model_path
    assert stop.wait_count == 1
    metrics = trainer.callback_metrics
    prefix = "val/explain/ca_lig"
    for name in (
        "completeness_gap",
        "completeness_gap_max",
        "sufficiency@attention",
        "reversed/comprehensiveness@attention",
        "special_share",
        "drift",
        "failed",
        "layer_profile/01",
        "layer_profile/02",
    ):
        assert f"{prefix}/{name}" in metrics, sorted(metrics)
    assert "val/explain/random/comprehensiveness@attention" in metrics
    assert metrics[f"{prefix}/failed"] == 0
    shares = metrics[f"{prefix}/layer_profile/01"] + metrics[f"{prefix}/layer_profile/02"]
    assert abs(float(shares) - 1) < 1e-5


def test_every_n_epochs_and_sanity_checking(tmp_path):
    seed_everything(0, verbose=False)
    probe = AttributionCallback(num_samples=3, every_n_epochs=2, folder=tmp_path / "probe")
    make_trainer(1, tmp_path, [probe], max_epochs=5).fit(Classifier(), loader(6), loader(5))
    names = sorted(path.name for path in (tmp_path / "probe").iterdir())
    assert [name.split("-")[1] for name in names] == ["0001", "0003"]


def test_validate_alone_runs_it_too(tmp_path):
    seed_everything(0, verbose=False)
    trainer = make_trainer(1, tmp_path, [AttributionCallback(num_samples=3)])
    trainer.validate(Classifier(), loader(5), verbose=False)
    assert "val/explain/ca_lig/completeness_gap" in trainer.callback_metrics


@pytest.mark.parametrize("task", ["callback", "empty_rank"])
def test_two_processes_give_what_one_gives(task, tmp_path):
    folders = [tmp_path / str(devices) for devices in (1, 2)]
    for devices, folder in enumerate(folders, start=1):
        folder.mkdir()
        run_worker(task, devices, folder)
    one, two, other = (
        json.loads((folder / name).read_text())
        for folder, name in (
            (folders[0], "scalars-1-0.json"),
            (folders[1], "scalars-1-0.json"),
            (folders[1], "scalars-1-1.json"),
        )
    )
    explained = {key for key in one if key.startswith("val/explain/") and not key.endswith("seconds")}
    assert set(one) == set(two) == set(other)
    assert all(two[key] == other[key] for key in explained), "the ranks must agree"
    for key in explained:
        assert abs(one[key] - two[key]) < 1e-5, key
    rows = [pq.read_table(next((folder / "probe").glob("epoch-0001-*.parquet"))).to_pylist() for folder in folders]
    assert [row["sample_id"] for row in rows[0]] == [row["sample_id"] for row in rows[1]]
    for a, b in zip(*rows, strict=True):
        assert torch.allclose(torch.tensor(a["scores"]), torch.tensor(b["scores"]), atol=1e-5)


def test_state_is_plain_and_comes_back(tmp_path):
    _, trainer = train(tmp_path, [AttributionCallback(num_samples=4)])
    probe = trainer.callbacks[0]
    state = probe.state_dict()
    path = tmp_path / "state.pt"
    torch.save(state, path)
    again = AttributionCallback(num_samples=4)
    again.load_state_dict(torch.load(path, weights_only=True))
    assert again.state_dict() == state and len(state["ids"]) == 4
    assert list(state["profiles"]) == [0, 1] and all(len(shares) > 1 for shares in state["profiles"].values())
    assert probe.state_key != AttributionCallback(num_samples=5).state_key


def test_errors_come_in_setup_and_name_the_way_out(tmp_path):
    class Two(Classifier):
        def __init__(self):
            super().__init__()
            self.other = Classifier().net

    with pytest.raises(InputError, match=r"holds 2 Hugging Face models: module.net .*module.other.*model=lambda"):
        train_module(tmp_path, Two(), AttributionCallback())
    trainer = train_module(tmp_path, Two(), AttributionCallback(num_samples=2, model=lambda module: module.other))
    assert "val/explain/ca_lig/completeness_gap" in trainer.callback_metrics
    with pytest.raises(InputError, match="Did you mean 'ca_lig'"):
        AttributionCallback("ca-lig")
    with pytest.raises(InputError, match="num_samples"):
        AttributionCallback(num_samples=0)
    with pytest.raises(InputError, match="operator 'mask' needs a mask token"):
        train_module(tmp_path, Classifier(), AttributionCallback(operator="mask"))

    class FSDPStrategy:
        pass

    class FakeTrainer:
        strategy = FSDPStrategy()
        loggers = ()

    with pytest.raises(InputError, match=r"FSDPStrategy.*strategy=ddp"):
        AttributionCallback().setup(FakeTrainer(), Classifier(), "fit")


def train_module(folder, module, probe):
    trainer = make_trainer(1, folder, [probe], num_sanity_val_steps=0)
    trainer.fit(module, loader(4), loader(4))
    return trainer


def test_a_logger_that_fails_is_named_once_and_never_ends_the_training(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    class WandbLogger(CSVLogger):
        calls = 0

        def log_metrics(self, metrics, step=None):
            if any(not isinstance(value, float | int) for value in metrics.values()):
                type(self).calls += 1
                raise OSError("the service is gone")
            super().log_metrics(metrics, step)

    logger = WandbLogger(tmp_path)
    with pytest.warns(UserWarning, match=r"WandbLogger failed.*OSError: the service is gone"):
        train(tmp_path, [AttributionCallback(num_samples=2)], logger=logger)
    assert WandbLogger.calls == 1
