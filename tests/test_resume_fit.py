"""A training that is broken off anywhere and continued ends as if it had never stopped."""

import csv
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from test_cli import TINY

from calig.pipeline.checkpoint import find_resumable, load_checkpoint
from calig.pipeline.cli import main
from calig.pipeline.directory import RunDirectory
from calig.pipeline.loading import learning_curves
from calig.pipeline.loggers import METRICS
from calig.pipeline.module import ClassificationModule
from calig.pipeline.stages.report import collect

# Dropout, so that a lost random state shows; 6 batches an epoch.
SETTINGS = [
    *TINY,
    "stages=[fit]",
    "data.batch_size=16",
    "model.scratch.dropout=0.2",
    "model.early_stopping=5",
    "logger.wandb.mode=disabled",
    "trainer.log_every_n_steps=1",
]


def weights(folder):
    return (Path(folder) / "model" / "model.safetensors").read_bytes()


def logged(folder):
    """The rows of metrics.csv without what a clock says; columns that a row does not have are left out."""
    with (Path(folder) / METRICS).open(newline="") as stream:
        rows = [{key: text for key, text in row.items() if text} for row in csv.DictReader(stream)]
    return [{key: text for key, text in row.items() if not key.endswith("seconds")} for row in rows]


def summary(folder):
    found = json.loads((Path(folder) / "summary.json").read_text())
    return {key: value for key, value in found.items() if "seconds" not in key}


def run(folder, *arguments):
    """Run in this process; returns the exit code."""
    own = {item.partition("=")[0] for item in arguments}
    settings = [item for item in SETTINGS if item.partition("=")[0] not in own]
    return main(["run", f"run.dir={folder}", *settings, *arguments])


def resume(folder, *arguments):
    return main(["run", f"run.resume={folder}", *arguments])


class AtBatch:
    """Does something just before the n-th training step of this process computes its loss."""

    def __init__(self, monkeypatch, number, action):
        self.count, self.number, self.action = 0, number, action
        step = ClassificationModule.training_step

        def counted(module, batch, batch_idx):
            self.count += 1
            if self.count == self.number:
                self.action()
            return step(module, batch, batch_idx)

        monkeypatch.setattr(ClassificationModule, "training_step", counted)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


VARIANTS = {
    "plain": [],
    "accumulated": ["trainer.accumulate_grad_batches=2"],
    "validated within": ["trainer.val_check_interval=0.5"],
    "by steps": ["trainer.max_steps=11", "trainer.max_epochs=-1"],
    "workers": ["data.num_workers=1"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, made when first asked for."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole") / "run"
            assert run(made[name], *VARIANTS[name]) == 0
        return made[name]

    return make


@pytest.mark.parametrize(
    ("variant", "batch"),
    [
        ("plain", 3),
        ("plain", 6),
        ("plain", 12),
        ("accumulated", 5),
        ("validated within", 3),
        ("by steps", 6),
        ("workers", 8),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("plain", 8),
                ("accumulated", 3),
                ("validated within", 6),
                ("by steps", 9),
                ("by steps", 11),
            ]
        ),
    ],
)
def test_sigterm_saves_and_the_resumed_run_equals_one_that_was_not_stopped(
    whole, tmp_path, monkeypatch, variant, batch
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        AtBatch(patch, batch, terminate)
        assert run(folder, *VARIANTS[variant]) == 143
    assert (folder / "checkpoints" / "last.ckpt").exists() and not (folder / "model").exists()
    assert resume(folder) == 0
    assert weights(folder) == weights(whole(variant))
    assert logged(folder) == logged(whole(variant))
    assert summary(folder) == summary(whole(variant))


def killed(action):
    """Do something in a forked copy of this process, which must end by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("batch", [2, 5, 9])
def test_a_run_that_was_killed_goes_on_from_the_last_checkpoint(whole, tmp_path, monkeypatch, batch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        AtBatch(patch, batch, kill)
        killed(lambda: run(folder, "checkpoint.every_n_steps=2"))
    assert (folder / "checkpoints").exists() == (batch > 2)
    if batch == 9:  # what was logged behind the checkpoint is logged once in the end
        assert max(int(row["step"]) for row in logged(folder)) == 7
    assert resume(folder) == 0
    assert weights(folder) == weights(whole("plain"))
    assert logged(folder) == logged(whole("plain"))


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    save, count = torch.save, 0

    def half(content, path):
        nonlocal count
        count += 1
        if count == 2:
            path.write_bytes(b"PK half a checkpoint")
            kill()
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr("calig.callbacks.exact_resume.torch.save", half)
        killed(lambda: run(folder, "checkpoint.every_n_steps=2"))
    assert find_resumable(folder / "checkpoints", print)[1] == 2
    assert resume(folder) == 0
    assert weights(folder) == weights(whole("plain"))
    assert not list(folder.rglob("*.tmp"))


def stopped(folder, monkeypatch, *arguments):
    """A run that SIGTERM ended in its 5th batch, with the checkpoint of the 2nd and 4th step before that."""
    with monkeypatch.context() as patch:
        AtBatch(patch, 5, terminate)
        assert run(folder, "checkpoint.every_n_steps=2", *arguments) == 143
    return folder / "checkpoints"


@pytest.mark.parametrize("damage", ["cut", "empty", "bytes", "one bit"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(whole, tmp_path, monkeypatch, capsys, damage):
    folder = tmp_path / "run"
    last = stopped(folder, monkeypatch) / "last.ckpt"
    content = last.read_bytes()
    half = len(content) // 2
    bit = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
    last.write_bytes({"cut": content[:half], "empty": b"", "bytes": b"\0" * len(content), "one bit": bit}[damage])
    assert resume(folder) == 0
    assert f"{last} is damaged" in capsys.readouterr().out
    assert weights(folder) == weights(whole("plain"))
    assert logged(folder) == logged(whole("plain"))


def test_nothing_but_damaged_checkpoints_is_said_and_not_trained_over(tmp_path, monkeypatch, capsys):
    checkpoints = stopped(tmp_path / "run", monkeypatch)
    for path in checkpoints.glob("*.ckpt"):
        path.write_bytes(b"nothing")
    assert resume(tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "last.ckpt" in error and "previous.ckpt" in error and "run.overwrite=true" in error


def test_batches_that_are_cut_otherwise_cannot_go_on_within_an_epoch(tmp_path, monkeypatch, capsys):
    stopped(tmp_path / "run", monkeypatch)
    assert resume(tmp_path / "run", "data.batch_size=8") == 2
    assert "data.batch_size=16 (now 8)" in capsys.readouterr().err


def test_a_full_disk_costs_a_checkpoint_and_not_the_training(tmp_path, monkeypatch):
    def full(content, path):
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("calig.callbacks.exact_resume.torch.save", full)
        assert run(tmp_path / "run") == 0
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    log = " ".join((tmp_path / "run" / "log.txt").read_text().split())
    assert "No space left on device" in log and "the last weights are taken" in log


def test_a_training_that_had_ended_is_not_trained_further(whole, tmp_path, monkeypatch):
    """The run dies after its last epoch, while the model is saved; early stopping had decided before."""
    arguments = ["model.early_stopping=1", "trainer.max_epochs=40", "model.lr=1e-12"]
    assert run(tmp_path / "whole", *arguments) == 0
    epochs = {row["epoch"] for row in logged(tmp_path / "whole")}
    assert len(epochs) == 2  # the second is no better than the first

    def fails(*_):
        raise OSError("disk gone")

    with monkeypatch.context() as patch:
        patch.setattr("calig.pipeline.stages.fit.save_model", fails)
        assert run(tmp_path / "run", *arguments) == 1
    assert resume(tmp_path / "run") == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    assert summary(tmp_path / "run") == summary(tmp_path / "whole")


def test_within_an_epoch_a_checkpoint_is_written_only_where_it_is_due(tmp_path, monkeypatch):
    from calig.callbacks.exact_resume import ExactResume

    saves, save = [], ExactResume._save

    def noted(self, trainer):
        saves.append(trainer.global_step)
        save(self, trainer)

    monkeypatch.setattr(ExactResume, "_save", noted)
    assert run(tmp_path / "run", "checkpoint.every_n_minutes=null") == 0
    assert saves == [6, 12]
    saves.clear()
    assert run(tmp_path / "steps", "checkpoint.every_n_steps=4") == 0
    assert saves == [4, 6, 8, 12]


def test_a_continued_run_stays_one_run_of_weights_and_biases(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        AtBatch(patch, 3, terminate)
        assert run(folder, "logger.wandb.mode=offline") == 143
    assert resume(folder) == 0
    parts = [path.name.split("-") for path in (folder / "wandb").glob("offline-run-*")]
    # offline-run-TIME-ID; a second one in the same second gets a number behind it.
    assert len(parts) == 2 and len({part[3] for part in parts}) == 1
    assert [line for line in (folder / "log.txt").read_text().splitlines() if "warning" in line] == []


def test_ctrl_c_ends_at_once_and_the_run_goes_on_from_the_epoch_before(whole, tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        AtBatch(patch, 8, interrupt)
        assert run(tmp_path / "run") == 130
    assert find_resumable(tmp_path / "run" / "checkpoints", print)[1] == 6
    assert resume(tmp_path / "run") == 0
    assert weights(tmp_path / "run") == weights(whole("plain"))
    assert logged(tmp_path / "run") == logged(whole("plain"))


@pytest.mark.parametrize("tail", ["1,0.5", "1,0.51234,0.0123,9", "\0" * 40, "\n1,0.2\n"])
def test_half_a_row_of_metrics_csv_is_left_out(whole, tmp_path, monkeypatch, tail):
    """A process that is killed while it logs leaves one; the epoch before is all there."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        AtBatch(patch, 8, terminate)
        assert run(folder) == 143
    with (folder / METRICS).open("a") as stream:
        stream.write(tail)
    assert learning_curves(folder)  # a report of what there is can be made
    assert resume(folder) == 0
    assert logged(folder) == logged(whole("plain"))


@pytest.mark.parametrize("name", ["last.ckpt", "model"])
def test_a_checkpoint_in_pieces_is_refused_with_the_way_out(tmp_path, monkeypatch, capsys, name):
    last = stopped(tmp_path / "run", monkeypatch) / "last.ckpt"
    last.unlink()
    (last / ".metadata").mkdir(parents=True)
    if name == "last.ckpt":
        assert resume(tmp_path / "run") == 2
    else:
        assert run(tmp_path / "other", f"model.checkpoint={last}") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{last} is a folder; expected a .ckpt file" in error and "consolidate_checkpoint" in error


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_is_mapped_into_memory_where_its_format_allows(tmp_path, monkeypatch, zipped):
    model = torch.nn.Linear(3, 2)
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": model.state_dict()}, path, _use_new_zipfile_serialization=zipped)
    load, asked = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: asked.append(kwargs["mmap"]) or load(*args, **kwargs))
    other = torch.nn.Linear(3, 2)
    load_checkpoint(other, str(path))
    assert asked == [zipped] and torch.equal(other.weight, model.weight)
    path.write_bytes(b"")  # the model has weights of its own
    assert torch.equal(other.weight, model.weight)


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        (["trainer.accumulate_grad_batches=2", "trainer.val_check_interval=2"], True),
        (["trainer.accumulate_grad_batches=2", "trainer.val_check_interval=1"], True),
        (["trainer.accumulate_grad_batches=2", "trainer.val_check_interval=3"], False),
        (["trainer.accumulate_grad_batches=6"], False),
        (["data.batch_size=96"], False),
    ],
)
def test_validations_that_leave_no_place_to_stop_within_an_epoch_are_named(tmp_path, settings, warned):
    assert run(tmp_path / "run", *settings, "trainer.max_epochs=1") == 0
    log = " ".join((tmp_path / "run" / "log.txt").read_text().split())
    assert ("goes on from the epoch's beginning" in log) == warned


def test_a_report_shows_what_was_explained_though_the_run_was_started_with_other_methods(tmp_path):
    folder = tmp_path / "run"
    assert run(folder, "explain.methods=[ca_lig]") == 0
    assert resume(folder, "stages=[explain,report]", "explain.methods=[input_x_gradient]") == 0
    # While a session writes, what earlier ones have logged is set aside: the page shows it all the same.
    assert "No learning curves" not in (folder / "report.html").read_text()
    data = collect(RunDirectory(folder))
    assert data.primary_method == "input_x_gradient" and len(data.samples) == 10
    assert all([one.method for one in sample.explanations] == ["input_x_gradient"] for sample in data.samples)
